"""Print packs of an index as text: `python tools/inspect_pack.py FOLDER [--pack N ...]`."""

from __future__ import annotations

import argparse
import sys

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.data.pack_index import PackIndex


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="pack index")
    parser.add_argument("--pack", type=int, nargs="+", default=[0], metavar="N", help="pack numbers, from 0")
    args = parser.parse_args()
    index = PackIndex.open(args.folder)
    print(f"{index.folder}: {len(index)} packs, {index.counts['samples']} samples, hash {index.hash}")
    for number in args.pack:
        if number < 0:
            raise UserError(f"--pack {number}: pack numbers start at 0; give 0 to {len(index) - 1}")
        print(index.pack(number))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("inspect_pack", main))
