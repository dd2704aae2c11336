"""Parallelism beside the model: groups, dispatch of tokens to ranks, the CPU rehearsal."""
