"""Benchmark of reading: bytes of row groups that storage gives per byte that packs use.

Station: synthetic samples of a stage -> mixture -> packs of steps -> dealt to nodes -> [figures] -> tools/bench.py.
Nothing is read (row_group_reads.py reads): each task has a source of its own, of pictures of 250 kB and clips of 500 kB
a second in row groups of one size, and a node, whose processes share what they read (data.row_group_cache), reads a row
group whole when one of its packs needs a row of it, unless its cache still holds it.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice, product
from typing import Any

from megatron_lance.config.schema import ModelConfig
from megatron_lance.data.mixture import MixtureSource, mix
from megatron_lance.data.step_shape import token_cost
from megatron_lance.data.synthetic import STAGES, TARGET_FPS, stage_samples
from megatron_lance.packing.packer import deal_packs, mask_pairs
from megatron_lance.packing.sample import Sample
from megatron_lance.packing.segment import SegmentKind
from megatron_lance.packing.step_packer import StepShape, pack_steps

SUMMARY = "bytes read of parquet row groups per byte used, by nodes and by how many row groups are mixed"
PICTURE, CLIP_SECOND = 250_000, 500_000
"""Bytes of a picture, and of a second of a clip."""
GroupKey = tuple[int, int]
"""Source and row group."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--stage", choices=sorted(STAGES), default="ct3", help="mixture and budget (default ct3)")
    parser.add_argument("--dp", type=int, default=24, help="replicas (default 24)")
    parser.add_argument("--micro-batches", type=int, default=2, help="packs per replica and step (default 2)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 3, 12], help="that divide dp (default 1 3 12)")
    parser.add_argument("--mixed", type=int, nargs="+", default=[1, 8, 64], help="data.mixing_row_groups, several")
    parser.add_argument("--samples", type=int, default=25000, help="samples (default 25000)")
    parser.add_argument("--group-mb", type=float, default=64.0, help="size of a row group (default 64)")
    parser.add_argument("--cache-gb", type=float, nargs="+", default=[12, 16, 64], help="of a node (default 12 16 64)")
    parser.add_argument("--step-seconds", type=float, default=6.5, help="for bytes per second (default: planned CT)")


def media_bytes(sample: Sample) -> int:
    """Size of the media of a sample; a condition that both encoders see counts once."""
    kinds = (SegmentKind.CLEAN, SegmentKind.NOISE) if sample.task.is_generation else (SegmentKind.VIT,)
    size = 0
    for segment in sample.segments:
        if segment.grid is not None and segment.kind in kinds:
            frames = 4 * segment.grid[0] - 3 if sample.task.is_generation else 2 * segment.grid[0]
            size += PICTURE if segment.grid[0] == 1 else round(CLIP_SECOND * frames / TARGET_FPS)
    return size


class NodeCache:
    """Row groups that a node holds, the least recently used leave first.

    Attributes:
        read: row groups read.

    Args:
        capacity: row groups.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.read = capacity, 0
        self._held: OrderedDict[GroupKey, None] = OrderedDict()

    def use(self, key: GroupKey) -> None:
        """Have a row group at hand."""
        if key not in self._held:
            self.read += 1
            self._held[key] = None
            if len(self._held) > self.capacity:
                self._held.popitem(last=False)
        self._held.move_to_end(key)


def _groups(tasks: Sequence[int], sizes: Sequence[int], group_bytes: float, mixed: int, seed: int) -> list[GroupKey]:
    """The row group of each sample, when the rows of each source are drawn in the order of the mixture."""
    found: list[GroupKey] = [(0, 0)] * len(tasks)
    for task in set(tasks):
        mine = [i for i, t in enumerate(tasks) if t == task]
        rows = max(1, round(group_bytes / (sum(sizes[i] for i in mine) / len(mine))))
        source = MixtureSource(f"source {task}", (rows,) * max(4 * mixed, -(-2 * len(mine) // rows)), 1.0)
        for i, draw in zip(mine, mix([source], seed, 1, mixed), strict=False):
            found[i] = task, draw.row // rows
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Simulate; the result is one JSON object."""
    order = list(STAGES[args.stage].shares())
    samples = list(islice(stage_samples(args.stage, 0), args.samples))
    tasks, sizes = [order.index(s.task) for s in samples], [media_bytes(s) for s in samples]
    packs = args.dp * args.micro_batches
    cost = token_cost(ModelConfig())
    shape = StepShape(STAGES[args.stage].capacity, packs, packs if packs % 2 else packs // 2, cost)
    rows = [(s.length, mask_pairs(s.segments), task) for s, task in zip(samples, tasks, strict=True)]
    steps = list(pack_steps(iter(rows), shape, 0))
    group_bytes = 1e6 * args.group_mb
    curve, used = [], 0
    whole = [step for step in steps if len(step) == packs]
    for mixed in args.mixed:
        groups = _groups(tasks, sizes, group_bytes, mixed, 0)
        for cache_gb, nodes in product(args.cache_gb, args.nodes):
            caches = [NodeCache(int(1e9 * cache_gb / group_bytes)) for _ in range(nodes)]
            used = 0
            for step in whole:
                costs = [sum(rows[i][1] + round(cost * rows[i][0]) for i in pack) for pack in step]
                for replica, mine in enumerate(deal_packs(costs, args.dp)):
                    for sample in (i for pack in mine for i in step[pack]):
                        caches[replica * nodes // args.dp].use(groups[sample])
                        used += sizes[sample]
            read = sum(cache.read for cache in caches) * group_bytes
            rate = read / len(whole) / nodes / args.step_seconds / 1e6
            figures = {"bytes_read_per_byte_used": read / used, "node_mb_per_second": rate}
            curve.append({"mixing_row_groups": mixed, "cache_gb": cache_gb, "nodes": nodes, **figures})
    names = ("stage", "dp", "micro_batches", "samples", "group_mb", "step_seconds")
    return {
        **{name: getattr(args, name) for name in names},
        "steps": len(steps),
        "bytes_used_per_step": used / len(whole),
        "used_mb_per_second": used / len(whole) / args.step_seconds / 1e6,
        "curve": curve,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    return "\n".join(
        [
            f"stage {result['stage']}, dp {result['dp']} x {result['micro_batches']} micro-batches, {result['steps']} "
            f"steps, row groups of {result['group_mb']:g} MB",
            f"{result['bytes_used_per_step'] / 1e6:.0f} MB used per step, {result['used_mb_per_second']:.0f} MB/s at "
            f"{result['step_seconds']:g} s a step",
            f"{'mixed':>6} {'cache GB':>9} {'nodes':>6} {'read / used':>12} {'MB/s a node':>12}",
            *(
                f"{one['mixing_row_groups']:>6} {one['cache_gb']:>9g} {one['nodes']:>6} "
                f"{one['bytes_read_per_byte_used']:>12.2f} {one['node_mb_per_second']:>12.0f}"
                for one in result["curve"]
            ),
        ]
    )
