"""Benchmark of reading: bytes that the processes of nodes read of storage per byte that their packs use.

Station: generated parquet files of a stage -> prepack -> processes that read, lockstep -> [figures] -> tools/bench.py.
Every process reads the media bytes and the texts of its tasks of every step, as the workers of a rank do, and decodes
nothing; first without and then with a cache of row groups for each node, a folder of this machine.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import fsspec
import pyarrow.parquet as pq

from megatron_lance.config.schema import DataConfig, ModelConfig, SourceConfig
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prepack import prepack
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.shares import Task, TextTask, packs_of_replica, rank_tasks
from megatron_lance.data.synthetic import STAGES
from megatron_lance.profiling.benchmarks.counted_files import PROTOCOL
from megatron_lance.profiling.benchmarks.stage_files import generate

SUMMARY = "bytes that several processes read of parquet files per byte used, with and without data.row_group_cache"
SEED, BARRIER_SECONDS = 1, 900.0


class Barrier(Protocol):
    """Where processes wait for one another."""

    def wait(self, timeout: float | None = None) -> int:
        """Until all are there."""
        ...

    def abort(self) -> None:
        """Wake all that wait, with an error."""
        ...


@dataclass(frozen=True)
class Reading:
    """What one process reads.

    Attributes:
        config: data section of its node.
        packs: of a step.
        replicas: ranks of all nodes, each a replica.
        replica: of this process.
        workers: processes of a rank.
        worker: number of this one among them.
        steps: to read.
    """

    config: DataConfig
    packs: int
    replicas: int
    replica: int
    workers: int
    worker: int
    steps: int

    def tasks(self, index: PackIndex, step: int) -> Sequence[Task]:
        """Of a step; the workers of a rank take turns.  What is left for a last, short step is dealt in turn."""
        packs = [index.pack(number) for number in index.global_batch(step, self.packs) if number < len(index)]
        whole = len(packs) == self.packs
        dealt = (
            packs_of_replica(packs, self.replicas, self.replica)
            if whole
            else range(len(packs))[self.replica :: self.replicas]
        )
        mine = [packs[i] for i in dealt]
        return rank_tasks(mine, 1, 0)[self.worker :: self.workers]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="folder with tokenizer.json")
    parser.add_argument("--stage", choices=sorted(STAGES), default="ct3", help="mixture and budget (default ct3)")
    parser.add_argument("--nodes", type=int, default=1, help="each with a cache of its own (default 1)")
    parser.add_argument("--ranks", type=int, default=4, help="of a node, each a replica (default 4)")
    parser.add_argument("--workers", type=int, default=2, help="processes of a rank (default 2)")
    parser.add_argument("--packs", type=int, default=48, help="of a step (default 48)")
    parser.add_argument("--mixed", type=int, default=8, help="data.mixing_row_groups (default 8)")
    parser.add_argument("--total-gb", type=float, default=6.0, help="of parquet files (default 6)")
    parser.add_argument("--group-mb", type=float, default=64.0, help="size of a row group (default 64)")
    parser.add_argument("--cache-gb", type=float, default=8.0, help="data.row_group_cache_gb (default 8)")
    parser.add_argument("--steps-without", type=int, default=2, help="read without a cache (default 2)")
    parser.add_argument("--folder", type=Path, help="for files and caches, emptied afterwards (default: the system's)")


def plan(folder: Path, args: argparse.Namespace) -> tuple[DataConfig, PackIndex]:
    """Files and packs of one epoch, in which every row is used once."""
    rows = generate(folder / "data", args.stage, 1e9 * args.total_gb, 1e6 * args.group_mb, SEED)
    sources = tuple(
        SourceConfig(str(task), f"{PROTOCOL}://{folder / 'data' / task}", str(task), weight=float(count))
        for task, count in rows.items()
    )
    config = DataConfig(
        sources=sources,
        pack_index=str(folder / "index"),
        tokenizer=str(args.tokenizer),
        seq_length=STAGES[args.stage].capacity,
        mixing_row_groups=args.mixed,
        row_group_cache_gb=args.cache_gb,
    )
    return config, prepack(config, ModelConfig(), SEED, args.packs, progress=False)


def read_steps(reading: Reading, barrier: Barrier) -> dict[str, Any]:
    """Read the tasks of a process, every step once all processes are done with the one before.

    Returns:
        Bytes read and used, ranges read, seconds, the peak of resident memory, what of it was no mapped file at the end
        of the fullest step, and a digest of the media of each step.
    """
    index = PackIndex.open(reading.config.pack_index)
    packs = PackReader(reading.config, index, Tokenizer(reading.config.tokenizer), SEED)
    storage = fsspec.filesystem(PROTOCOL)
    read, reads = storage.bytes_read, storage.reads
    used, own, digests = [], 0, []
    start = 0.0
    try:
        for step in range(reading.steps):
            barrier.wait(BARRIER_SECONDS)
            start = start or time.perf_counter()
            digest, size = hashlib.sha256(), 0
            for task in reading.tasks(index, step):
                if isinstance(task, TextTask):
                    packs.tokens(task.pack)
                    continue
                medium = packs.requests(task.pack, task.items)[0].data
                digest.update(medium)
                size += len(medium)
            used.append(size)
            digests.append(digest.hexdigest())
            own = max(own, _memory("RssAnon"))
    finally:
        if len(used) < reading.steps:
            barrier.abort()
    return {
        **{"read": storage.bytes_read - read, "reads": storage.reads - reads, "used": used},
        **{"seconds": time.perf_counter() - start, "peak": _memory("VmHWM"), "own": own, "digests": digests},
    }


def _memory(name: str) -> int:
    """A figure of this process, bytes; the kernel's VmHWM, unlike getrusage's, leaves out who began the process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _measure(config: DataConfig, args: argparse.Namespace, steps: int, caches: Path | None) -> list[dict[str, Any]]:
    """What each process did, node by node."""
    context, replicas = get_context("spawn"), args.nodes * args.ranks
    places = [(replica, worker) for replica in range(replicas) for worker in range(args.workers)]

    def node_config(replica: int) -> DataConfig:
        folder = "" if caches is None else str(caches / f"node_{replica // args.ranks}")
        return replace(config, row_group_cache=folder)

    with context.Manager() as manager, ProcessPoolExecutor(len(places), mp_context=context) as pool:
        barrier = manager.Barrier(len(places))
        running = [
            pool.submit(
                read_steps,
                Reading(node_config(replica), args.packs, replicas, replica, args.workers, worker, steps),
                barrier,
            )
            for replica, worker in places
        ]
        return [one.result() for one in running]


def _figures(found: list[dict[str, Any]], nodes: int) -> dict[str, Any]:
    """Of all processes together; `by_node` is what a node read over what all nodes used."""
    used = sum(sum(one["used"]) for one in found)
    size = len(found) // nodes
    by_node = [sum(one["read"] for one in found[node * size : (node + 1) * size]) for node in range(nodes)]
    return {
        "steps": len(found[0]["used"]),
        "bytes_read_per_byte_used": sum(by_node) / used,
        "by_node": [read / used for read in by_node],
        **{"bytes_read": sum(by_node), "bytes_used": used, "ranges_read": sum(one["reads"] for one in found)},
        "seconds": max(one["seconds"] for one in found),
        "peak_mib": max(one["peak"] for one in found) / 2**20,
        "peak_anonymous_mib": max(one["own"] for one in found) / 2**20,
    }


def _is_same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> bool:
    """Whether all processes read the same media in the steps that both did."""
    pairs = (zip(a["digests"], b["digests"], strict=False) for a, b in zip(first, second, strict=True))
    return all(one == other for pair in pairs for one, other in pair)


def _runs(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Each figure with its name."""
    config, index = plan(folder, args)
    steps = -(-len(index) // args.packs)  # every pack once, so the last step may be short
    groups = [pq.ParquetFile(path).metadata.num_row_groups for path in (folder / "data").rglob("*.parquet")]
    yield "row_groups", sum(groups)
    without = _measure(config, args, min(args.steps_without, steps), None)
    yield "without", _figures(without, args.nodes)
    caches = folder / "caches"
    cached = _measure(config, args, steps, caches)
    yield "with", _figures(cached, args.nodes)
    sizes = [sum(file.stat().st_size for file in node.iterdir()) for node in sorted(caches.iterdir())]
    yield "gb_in_cache_at_the_end", [size / 1e9 for size in sizes]
    yield "bytes_used_per_step", sum(sum(one["used"]) for one in cached) * args.packs / len(index)
    yield "same_bytes", _is_same(without, cached)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the result is one JSON object."""
    folder = Path(tempfile.mkdtemp(prefix="row_group_reads_", dir=args.folder))
    try:
        figures = dict(_runs(folder, args))
    finally:
        shutil.rmtree(folder)
    names = ("stage", "nodes", "ranks", "workers", "packs", "mixed", "total_gb", "group_mb", "cache_gb")
    return {**{name: getattr(args, name) for name in names}, **figures}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"stage {result['stage']}, {result['nodes']} nodes of {result['ranks']} x {result['workers']} processes, "
        f"{result['row_groups']} row groups of {result['group_mb']:g} MB, {result['mixed']} mixed, "
        f"{result['cache_gb']:g} GB of cache per node",
        f"{'cache':>8} {'steps':>6} {'read / used':>12} {'s / step':>9} {'peak MiB':>9} {'unmapped':>9}",
    ]
    for name in ("without", "with"):
        one = result[name]
        lines.append(
            f"{name:>8} {one['steps']:>6} {one['bytes_read_per_byte_used']:>12.3f} "
            f"{one['seconds'] / one['steps']:>9.2f} {one['peak_mib']:>9.0f} {one['peak_anonymous_mib']:>9.0f}"
        )
    same = "the same bytes" if result["same_bytes"] else "OTHER BYTES"
    return "\n".join([*lines, f"{same} both ways; {result['bytes_used_per_step'] / 1e6:.0f} MB used per step"])
