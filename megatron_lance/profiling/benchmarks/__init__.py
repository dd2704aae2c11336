"""Benchmarks: each module has SUMMARY, `add_arguments(parser)`, `run(args)` -> JSON object, and `table(result)`."""
