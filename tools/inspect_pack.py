"""Show packs of an index as text and as pictures: `python tools/inspect_pack.py FOLDER [--pack N ...] [--png DIR]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.data.pack_index import PackIndex, PlannedPack
from megatron_lance.profiling.pack_picture import deal, draw


def _deal_as_text(planned: PlannedPack, cp: int) -> str:
    """A line per context-parallel rank."""
    _, works = deal(planned, cp)
    tiles = sum(work.tiles for work in works)
    return "\n".join(
        f"  cp rank {rank}: {work.rows} rows, {work.pairs} mask pairs, {work.tiles / tiles:.2%} of the tiles"
        for rank, work in enumerate(works)
    )


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="pack index")
    parser.add_argument("--pack", type=int, nargs="+", default=[0], metavar="N", help="pack numbers, from 0")
    parser.add_argument("--cp", type=int, default=1, metavar="RANKS", help="context-parallel ranks to deal to")
    parser.add_argument("--png", type=Path, metavar="DIR", help="existing folder for a picture of each pack")
    args = parser.parse_args()
    if args.cp < 1:
        raise UserError(f"--cp {args.cp}: must be at least 1; give the number of context-parallel ranks")
    if args.png and not args.png.is_dir():
        raise UserError(f"--png {args.png}: is no folder; make it first")
    index = PackIndex.open(args.folder)
    print(f"{index.folder}: {len(index)} packs, {index.counts['samples']} samples, hash {index.hash}")
    for number in args.pack:
        if number < 0:
            raise UserError(f"--pack {number}: pack numbers start at 0; give 0 to {len(index) - 1}")
        if number >= len(index):
            print(f"pack {number} lies behind the last one: pack {number % len(index)} again, with later epochs' noise")
        planned = index.pack(number)
        print(planned)
        if args.cp > 1:
            print(_deal_as_text(planned, args.cp))
        if args.png:
            path = args.png / f"pack_{number:06}.png"
            draw(planned, args.cp).save(path)
            print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("inspect_pack", main))
