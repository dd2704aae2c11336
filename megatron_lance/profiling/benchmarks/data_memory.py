"""Benchmark of the data path's memory: resident memory while many packs are read ahead.

Station: drawn pictures and clips in parquet -> prepack -> background reading -> [memory] -> tools/bench.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_lance.config.schema import DataConfig
from megatron_lance.data.background import Ahead, StepReader
from megatron_lance.data.decode import MediaReader
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.reading import TaskReader
from megatron_lance.profiling.benchmarks.damaged_files import clip, picture
from megatron_lance.profiling.benchmarks.data_path import data_config, pack_tasks, readers
from megatron_lance.profiling.benchmarks.prepack import WORDS

SUMMARY = "memory of the data path while many packs are read ahead by worker processes"
SMALL_ROWS = 512
"""Rows of each of two parquet files."""
SAMPLES = 80
"""Looks at memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="folder with tokenizer.json")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default 2)")
    parser.add_argument("--packs", type=int, default=2000, help="packs that are read (default 2000)")


def _small(folder: Path, tokenizer: str) -> DataConfig:
    """Many small pictures and clips, a few per pack."""
    (folder / "small").mkdir()
    captions = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 12)) for i in range(SMALL_ROWS)]
    kinds = {
        "t2v": ("video_bytes", [clip(9 + i % 5, 64 + 16 * (i % 3), 96) for i in range(32)]),
        "t2i": ("image_bytes", [picture(name) for name in ("JPEG", "PNG", "WEBP")]),
    }
    for task, (column, media) in kinds.items():
        columns = {"caption": captions, column: [media[i % len(media)] for i in range(SMALL_ROWS)]}
        pq.write_table(pa.table(columns), folder / "small" / f"{task}.parquet", row_group_size=64)
    sizes = {"vae_resolution": 64, "vit_resolution": 56, "max_seconds_generation": 0.75}
    return data_config(folder, tokenizer, "small", seq_length=512, **sizes)


def _memory(index: PackIndex, packs: PackReader, workers: int, count: int) -> Iterator[dict[str, float]]:
    """Resident memory, MiB, of this process and of all workers together, while packs are read."""
    reader = TaskReader(packs, MediaReader("host", 1))
    every = max(1, count // SAMPLES)
    with closing(StepReader(reader, pack_tasks(index), Ahead(workers, 1, 600.0), {})) as ahead:
        for step in range(count):
            ahead.step(step)
            if step % every == every - 1:
                own, *others = (psutil.Process(pid).memory_info().rss / 2**20 for pid in (os.getpid(), *ahead.pids))
                yield {"packs": step + 1, "process": own, "workers": sum(others)}


def _flatness(curve: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of the last quarter over mean of the second, and growth per 1000 packs between them, MiB."""
    quarter = len(curve) // 4
    totals = [point["process"] + point["workers"] for point in curve]
    second, last = statistics.mean(totals[quarter : 2 * quarter]), statistics.mean(totals[-quarter:])
    packs = curve[-1]["packs"] / 2  # between the middles of the two quarters
    return {"last_over_second_quarter": last / second, "mib_per_1000_packs": 1000 * (last - second) / packs}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the result is one JSON object."""
    with tempfile.TemporaryDirectory(prefix="data_memory_") as name:
        index, packs = readers(_small(Path(name), str(Path(args.tokenizer).resolve())))
        curve = list(_memory(index, packs, args.workers, args.packs))
        counts = {"packs_of_the_index": len(index), "samples_of_the_index": index.counts["samples"]}
    result = {"workers": args.workers, "packs": args.packs, **counts, **_flatness(curve)}
    return {**result, "load_average": os.getloadavg()[0], "curve_mib": curve}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    first, last = result["curve_mib"][0], result["curve_mib"][-1]
    return "\n".join(
        [
            f"MiB of process + {result['workers']} workers: {first['process']:.0f} + {first['workers']:.0f} after "
            f"{first['packs']} packs, {last['process']:.0f} + {last['workers']:.0f} after {last['packs']}",
            f"last quarter over second {result['last_over_second_quarter']:.4f}, "
            f"{result['mib_per_1000_packs']:+.2f} MiB per 1000 packs",
        ]
    )
