"""Benchmarks: `python tools/bench.py NAME [options] [--json FILE]` prints a table and writes one JSON object."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.profiling.benchmarks import (
    cp_balance,
    data_memory,
    data_path,
    long_pack,
    mape,
    mape_registers,
    packing,
    prepack,
    row_groups,
)
from megatron_lance.profiling.provenance import provenance
from megatron_lance.training import damaged_benchmark, plan_benchmark, sampling_benchmark, save_benchmark

BENCHMARKS = {
    "cp-balance": cp_balance,
    "damaged-media": damaged_benchmark,
    "data-memory": data_memory,
    "data-path": data_path,
    "long-pack": long_pack,
    "mape": mape,
    "mape-registers": mape_registers,
    "packing": packing,
    "plan-check": plan_benchmark,
    "sampling": sampling_benchmark,
    "save": save_benchmark,
    "prepack": prepack,
    "row-groups": row_groups,
}


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        sub = commands.add_parser(name, help=benchmark.SUMMARY, description=benchmark.SUMMARY)
        benchmark.add_arguments(sub)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the result and where it was measured")
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; make it first")
    benchmark = BENCHMARKS[args.name]
    result = benchmark.run(args)
    if os.environ.get("RANK", "0") != "0":
        return 0
    print(benchmark.table(result))
    if args.json:
        command = " ".join(["python", "tools/bench.py", *sys.argv[1:]])
        args.json.write_text(json.dumps({"command": command, **provenance(), **result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("bench", main))
