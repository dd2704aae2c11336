"""Print packs of an index as text: `python tools/inspect_pack.py FOLDER [--pack N ...]`."""

from __future__ import annotations

import argparse
import sys

from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.pack_index_format import PackIndexError


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="pack index")
    parser.add_argument("--pack", type=int, nargs="+", default=[0], help="pack numbers")
    args = parser.parse_args()
    try:
        index = PackIndex.open(args.folder)
        print(f"{index.folder}: {len(index)} packs, {index.counts['samples']} samples, hash {index.hash}")
        for number in args.pack:
            print(index.pack(number))
    except (PackIndexError, ValueError) as error:
        print(f"inspect_pack: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
