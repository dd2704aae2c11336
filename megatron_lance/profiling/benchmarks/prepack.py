"""Benchmark of prepack: time, memory and size for many rows of metadata.

Station: generated parquet files of a stage -> prepack -> [figures] -> tools/bench.py.  The rows have the tasks, ratios
and durations of the stage and captions of some hundred words, but media of few pixels: what is measured is reading
rows, probing headers, tokenising, planning, packing and writing, not moving media.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from megatron_lance.config.errors import UserError
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.sizes import ASPECT_RATIOS
from megatron_lance.data.synthetic import STAGES
from megatron_lance.packing.rng import stream
from megatron_lance.packing.sample import Task

SUMMARY = "time, memory and index size of prepack on generated rows with media of few pixels"
PROGRAM = Path(__file__).resolve().parents[3] / "tools" / "prepack.py"
ROWS_PER_FILE, ROWS_PER_GROUP, GLOBAL_BATCH, PROJECTED_ROWS = 20_000, 4096, 48, 1_140_000_000
WORDS = "a red car slowly turns left behind two tall trees while the camera follows it through morning fog".split()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--stage", choices=sorted(STAGES), default="ct3", help="mixture and budget (default ct3)")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of all sources (default 100000)")
    parser.add_argument("--workers", type=int, default=2, help="processes that probe (default 2)")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="folder with tokenizer.json")
    parser.add_argument("--first-only", action="store_true", help="leave out planning anew, a new shard, projection")


def _picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4 * width, 4 * height), (90, 120, 30)).save(file, "JPEG")
    return file.getvalue()


def _clip(width: int, height: int, frames: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream_ = container.add_stream("libx264", rate=24, options={"preset": "ultrafast", "threads": "1"})
        stream_.width, stream_.height, stream_.pix_fmt = 8 * width, 8 * height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.full((8 * height, 8 * width, 3), 99, np.uint8), format="rgb24")
        for _ in range(frames):
            container.mux(stream_.encode(frame))
        container.mux(stream_.encode())
    return file.getvalue()


def _columns(task: Task, count: int, rng: np.random.Generator, media: dict[str, list[bytes]]) -> dict[str, Any]:
    """The rows of a file of one task."""

    def take(kind: str) -> list[bytes]:
        return [media[kind][i] for i in rng.integers(len(media[kind]), size=count)]

    texts = [" ".join(WORDS[i] for i in rng.integers(len(WORDS), size=90)) for _ in range(500)]
    caption = [f"{number} {texts[i]}" for number, i in enumerate(rng.integers(500, size=count))]
    kind = "image" if task in (Task.T2I, Task.I_EDIT, Task.S2I, Task.I2T) else "video"
    if task.is_edit:
        return {f"input_{kind}_bytes": take(kind), "caption": caption, f"output_{kind}_bytes": take(kind)}
    if task.is_subject_driven:
        rows = zip(take("image"), take("image"), caption, take(kind), strict=True)
        return {
            "interleave_array": [[a, b, text.encode(), target] for a, b, text, target in rows],
            "element_dtype_array": [["image", "image", "text", kind]] * count,
        }
    if not task.is_generation:
        question = {"caption_i": [""] * count, "caption_q": ["What can be seen?"] * count}
        return {f"{kind}_bytes": take(kind), **question, "caption_a": caption}
    return {"caption": caption, f"{kind}_bytes": take(kind)}


def generate(folder: Path, stage: str, rows: int, seed: int) -> None:
    """Write the parquet files of a stage, a folder per task."""
    rng = stream(seed, "prepack benchmark")
    seconds = np.clip(3.0 * np.exp(0.5 * rng.standard_normal(8)), 1.0, 6.0)
    media = {
        "image": [_picture(*ratio) for ratio in ASPECT_RATIOS],
        "video": [_clip(*ratio, round(24 * s)) for ratio in ASPECT_RATIOS for s in seconds],
    }
    for task, share in STAGES[stage].shares().items():
        (folder / task).mkdir(parents=True)
        left, number = max(1, round(share * rows)), 0
        while left:
            count = min(left, ROWS_PER_FILE)
            table = pa.table(_columns(task, count, rng, media))
            pq.write_table(table, folder / task / f"{number:05}.parquet", row_group_size=ROWS_PER_GROUP)
            left, number = left - count, number + 1


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _timed(folder: Path, workers: int, *overrides: str) -> dict[str, float]:
    """What a run of tools/prepack.py took.

    Raises:
        UserError: if it failed; its own message stands above.
    """
    command = [sys.executable, str(PROGRAM), "--config", str(folder / "run.yaml"), "--force"]
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*command, "--workers", str(workers), *overrides],
        env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[1])},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    wall = time.perf_counter() - wall
    if done.returncode:
        raise UserError(f"tools/prepack.py ended with exit code {done.returncode}; its own message stands above")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": wall, "cpu_seconds": cpu, "load_average": os.getloadavg()[0]}


def _write_config(folder: Path, stage: str, tokenizer: str) -> None:
    shares = {str(task): share for task, share in STAGES[stage].shares().items()}
    sources = [
        {"name": task, "path": str(folder / "data" / task), "task": task, "weight": share}
        for task, share in shares.items()
    ]
    data: dict[str, Any] = {"sources": sources, "pack_index": str(folder / "index"), "facts": str(folder / "facts")}
    data |= {"tokenizer": str(Path(tokenizer).resolve()), "seq_length": STAGES[stage].capacity}
    settings = {"data": data, "training": {"global_batch_size": GLOBAL_BATCH}}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def _measure(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Each figure with its name."""
    _write_config(folder, args.stage, args.tokenizer)
    first = _timed(folder, args.workers)
    yield "first", first
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the writer too, which writes one file
    yield "peak_gib", {"largest_process": largest, "bound": (args.workers + 1) * largest}
    index = PackIndex.open(folder / "index")
    samples, sizes = index.counts["samples"], {"facts": _bytes(folder / "facts"), "index": _bytes(folder / "index")}
    yield "counts", index.counts
    yield "fill", index.counts["tokens"] / (index.counts["packs"] * index.capacity)
    yield "bytes_per_row", {name: size / samples for name, size in sizes.items()}
    if args.first_only:
        return
    again = _timed(folder, args.workers, f"data.seq_length={index.capacity - 6000}", "data.vae_resolution=480")
    yield "another_budget_and_resolution", again
    source = sorted((folder / "data").iterdir())[0]
    shutil.copy(source / "00000.parquet", source / "99999.parquet")
    yield "one_more_shard", _timed(folder, args.workers)
    scale = PROJECTED_ROWS / samples
    yield (
        "projected",
        {
            "rows": PROJECTED_ROWS,
            "probe_core_hours": (first["cpu_seconds"] - again["cpu_seconds"]) * scale / 3600,
            "plan_core_hours": again["cpu_seconds"] * scale / 3600,
            "facts_gb": sizes["facts"] * scale / 1e9,
            "index_gb": sizes["index"] * scale / 1e9,
        },
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the result is one JSON object."""
    with tempfile.TemporaryDirectory(prefix="prepack_") as name:
        folder = Path(name)
        writer = get_context("spawn").Process(target=generate, args=(folder / "data", args.stage, args.rows, 1))
        writer.start()  # a process of its own, as prepack is
        writer.join()
        figures = dict(_measure(folder, args))
    return {"stage": args.stage, "rows": args.rows, "workers": args.workers, **figures}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    sizes, peak = result["bytes_per_row"], result["peak_gib"]
    lines = [
        f"{result['counts']['samples']} samples of stage {result['stage']}, {result['workers']} workers; fill "
        f"{result['fill']:.2%}"
    ]
    for name in ("first", "another_budget_and_resolution", "one_more_shard"):
        if name not in result:
            continue
        figures = result[name]
        lines.append(
            f"{name:>30}: {figures['seconds']:>7.0f} s, {figures['cpu_seconds']:>7.0f} CPU s, load "
            f"{figures['load_average']:.1f}"
        )
    lines += [
        f"{'peak memory':>30}: {peak['largest_process']:.2f} GiB in a process, below {peak['bound']:.2f} in all",
        f"{'bytes per row':>30}: facts {sizes['facts']:.0f}, index {sizes['index']:.0f}",
    ]
    if projected := result.get("projected"):
        lines.append(
            f"{'projected for 1.14 billion':>30}: {projected['probe_core_hours']:.0f} core hours to probe, "
            f"{projected['plan_core_hours']:.0f} to plan; facts {projected['facts_gb']:.0f} GB, index "
            f"{projected['index_gb']:.0f} GB"
        )
    return "\n".join(lines)
