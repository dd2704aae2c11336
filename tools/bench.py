"""Benchmarks: `python tools/bench.py NAME [options] [--json [FILE]]` prints a table, or one JSON object.

With a FILE it prints the table and writes the object.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.profiling.provenance import provenance

BENCHMARKS = {
    "attention": "profiling.benchmarks.attention",
    "cp-balance": "profiling.benchmarks.cp_balance",
    "damaged-media": "training.damaged_benchmark",
    "data-memory": "profiling.benchmarks.data_memory",
    "data-path": "profiling.benchmarks.data_path",
    "fp8-padding": "profiling.benchmarks.fp8_padding",
    "long-pack": "profiling.benchmarks.long_pack",
    "mape": "profiling.benchmarks.mape",
    "mape-registers": "profiling.benchmarks.mape_registers",
    "packing": "profiling.benchmarks.packing",
    "plan-check": "training.plan_benchmark",
    "sampling": "training.sampling_benchmark",
    "save": "training.save_benchmark",
    "prepack": "profiling.benchmarks.prepack",
    "row-group-reads": "profiling.benchmarks.row_group_reads",
    "row-groups": "profiling.benchmarks.row_groups",
}
STDOUT = Path("-")


def _modules(arguments: list[str]) -> dict[str, ModuleType]:
    """The benchmark that is asked for, or all: most need libraries that others do not."""
    wanted = arguments[:1] if arguments and arguments[0] in BENCHMARKS else list(BENCHMARKS)
    return {name: importlib.import_module(f"megatron_lance.{BENCHMARKS[name]}") for name in wanted}


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    benchmarks = _modules(sys.argv[1:])
    for name, benchmark in benchmarks.items():
        sub = commands.add_parser(name, help=benchmark.SUMMARY, description=benchmark.SUMMARY)
        benchmark.add_arguments(sub)
        sub.add_argument(
            "--json",
            type=Path,
            nargs="?",
            const=STDOUT,
            metavar="FILE",
            help="the result and where it was measured as one JSON object: print it, or write it to FILE",
        )
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; make it first")
    benchmark = benchmarks[args.name]
    result = benchmark.run(args)
    if os.environ.get("RANK", "0") != "0":
        return 0
    command = " ".join(["python", "tools/bench.py", *sys.argv[1:]])
    text = json.dumps({"command": command, **provenance(), **result}, indent=1)
    if args.json and args.json != STDOUT:
        args.json.write_text(text + "\n")
    print(text if args.json == STDOUT else benchmark.table(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench", main))
