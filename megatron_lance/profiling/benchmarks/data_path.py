"""Benchmark of the data path: its cost beside bare decoding, and how long a consumer waits.

Station: drawn clips in parquet -> prepack -> background reading -> [figures] -> tools/bench.py.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F  # noqa: N812

from megatron_lance.config.schema import DataConfig, ModelConfig, SourceConfig
from megatron_lance.data.background import Ahead, StepReader
from megatron_lance.data.decode import DecodeRequest, MediaReader, ReadMedia
from megatron_lance.data.loader import PackReader
from megatron_lance.data.media import read_frames
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prepack import prepack
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.reading import Media, TaskReader
from megatron_lance.data.shares import Task, TextTask, rank_tasks
from megatron_lance.data.sizes import crop_window
from megatron_lance.packing.batch import PackTokens
from megatron_lance.profiling.benchmarks.damaged_files import clip

SUMMARY = "data path: time beside bare PyAV decoding, share of time a consumer at half the peak waits"
SEED = 1
SECONDS, RATE = 3, 24
"""Of a clip: seconds, frames per second; every second frame is wanted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="folder with tokenizer.json")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="of every time, at least 2 (default 5)")
    parser.add_argument("--clips", type=int, default=8, help="H.264 clips of 3 s (default 8)")
    parser.add_argument("--height", type=int, default=720, help="of the clips, pixels, 16:9 (default 720)")


class _BareReader(TaskReader):
    """Reads by PyAV and torch alone.

    Args:
        resize: bring the frames to their size; else only decode.
    """

    def __init__(self, packs: PackReader, media: MediaReader, resize: bool) -> None:
        super().__init__(packs, media)
        self.resize = resize

    def read(self, task: Task, before_decoding: Callable[[], None] = lambda: None) -> PackTokens | Media:
        if isinstance(task, TextTask):
            return super().read(task)
        requests = self.packs.requests(task.pack, task.items)
        return tuple(ReadMedia(self._pixels(request), request.normalize) for request in requests)

    def _pixels(self, request: DecodeRequest) -> torch.Tensor:
        """What is handed on: of frames alone nothing."""
        if self.resize:
            return bare_pixels(request)
        bare_decode(request)
        return torch.zeros(0)


def bare_decode(request: DecodeRequest) -> list[npt.NDArray[Any]]:
    """The wanted frames by bare PyAV, uint8 [H, W, 3] each: decoded in order up to the last, the wanted ones to RGB."""
    wanted, last = set(request.frames), max(request.frames)
    made = []
    with av.open(io.BytesIO(request.data), "r") as container:
        container.streams.video[0].thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                made.append(frame.to_ndarray(format="rgb24"))
            if number == last:
                break
    return made


def bare_pixels(request: DecodeRequest) -> torch.Tensor:
    """The wanted frames at their size, uint8 [3, T, H, W], by PyAV and torch's antialiased resize of whole bytes."""
    frames = torch.from_numpy(np.stack(bare_decode(request))).permute(0, 3, 1, 2)
    top, left, height, width = crop_window(frames.shape[3], frames.shape[2], request.bucket)
    window = frames[:, :, top : top + height, left : left + width]
    resized = F.interpolate(window, size=request.bucket, mode="bicubic", antialias=True)
    top, left = ((b - s) // 2 for b, s in zip(request.bucket, request.size, strict=True))
    return resized[:, :, top : top + request.size[0], left : left + request.size[1]].transpose(0, 1).contiguous()


def data_config(folder: Path, tokenizer: str, name: str, **settings: Any) -> DataConfig:
    """Data section over the files t2v.parquet and t2i.parquet of a folder's folder `name`."""
    sources = tuple(
        SourceConfig(task, str(folder / name / f"{task}.parquet"), task)
        for task in ("t2v", "t2i")
        if (folder / name / f"{task}.parquet").exists()
    )
    index = str(folder / f"{name} index")
    return DataConfig(sources=sources, tokenizer=tokenizer, pack_index=index, decode_threads=1, **settings)


def _large(folder: Path, tokenizer: str, clips: int, height: int) -> DataConfig:
    """A few clips of usual size, one per pack."""
    (folder / "large").mkdir()
    width = height * 16 // 9 // 16 * 16
    media = [clip(RATE * SECONDS, width - 16 * (i % 4), height, rate=RATE, preset="veryfast") for i in range(clips)]
    table = pa.table({"caption": [f"clip {i}" for i in range(clips)], "video_bytes": media})
    pq.write_table(table, folder / "large" / "t2v.parquet")
    return data_config(folder, tokenizer, "large", seq_length=20_000, max_seconds_generation=float(SECONDS))


def readers(config: DataConfig) -> tuple[PackIndex, PackReader]:
    """Plan packs; the index and a reader of them."""
    index = prepack(config, ModelConfig(), SEED, 1, progress=False)
    return index, PackReader(config, index, Tokenizer(config.tokenizer), SEED)


def pack_tasks(index: PackIndex) -> Callable[[int], Sequence[Task]]:
    """Steps of one pack each, all read by one rank."""
    return lambda step: rank_tasks([index.pack(step)], 1, 0)


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = (
        statistics.quantiles(values, n=5)[0],
        statistics.median(values),
        statistics.quantiles(values, n=5)[-1],
    )
    return {"p20": low, "p50": middle, "p80": high}


def _cpu_times(index: PackIndex, packs: PackReader, repeats: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds per clip in one process and thread: frames, and pixels at their size, by bare ways and ours."""
    items = [(n, item) for n in range(len(index)) for item in index.pack(n).media]
    requests = [packs.requests(n, [item])[0] for n, item in items]
    media = MediaReader("host", 1)
    ways: dict[str, Callable[[DecodeRequest], Any]] = {
        "bare_frames": bare_decode,
        "frames": lambda request: read_frames(request.data, request.frames),
        "bare_pixels": bare_pixels,
        "pixels": lambda request: media([request]),
    }
    for way in ways.values():
        way(requests[0])
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for request in requests:
            for name, way in ways.items():
                start = time.process_time()
                way(request)
                found[name].append(1000 * (time.process_time() - start))
    return {name: _spread(values) for name, values in found.items()}


def _wall_times(index: PackIndex, packs: PackReader, workers: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds per pass over all packs with workers, by the bare ways and ours; without the first pass."""
    ahead = Ahead(workers, 1, 600.0)
    media = MediaReader("host", 1)
    ways = {
        "bare_frames": _BareReader(packs, media, False),
        "bare_pixels": _BareReader(packs, media, True),
        "ours": TaskReader(packs, media),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        with closing(StepReader(way, pack_tasks(index), ahead, {})) as reader:
            for lap in range(repeats + 1):
                start = time.perf_counter()
                for step in range(lap * len(index), (lap + 1) * len(index)):
                    reader.step(step)
                if lap:
                    found[name].append(time.perf_counter() - start)
    return {name: _spread(values) for name, values in found.items()}


def _waiting(index: PackIndex, packs: PackReader, workers: int, seconds_per_pack: float, laps: int) -> dict[str, Any]:
    """How long a consumer waits that takes a pack every `2 * seconds_per_pack` and uses no CPU itself."""
    waits = []
    with closing(
        StepReader(TaskReader(packs, MediaReader("host", 1)), pack_tasks(index), Ahead(workers, 1, 600.0), {})
    ) as r:
        for step in range((laps + 1) * len(index)):
            start = time.perf_counter()
            r.step(step)
            waits.append(time.perf_counter() - start)
            time.sleep(2 * seconds_per_pack)
    waits = waits[len(index) :]  # the first lap starts the processes
    busy = len(waits) * 2 * seconds_per_pack
    return {"share": sum(waits) / (sum(waits) + busy), "seconds_per_pack": 2 * seconds_per_pack, "longest": max(waits)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the result is one JSON object."""
    tokenizer = str(Path(args.tokenizer).resolve())
    with tempfile.TemporaryDirectory(prefix="data_path_") as name:
        index, packs = readers(_large(Path(name), tokenizer, args.clips, args.height))
        cpu = _cpu_times(index, packs, args.repeats)
        wall = _wall_times(index, packs, args.workers, args.repeats)
        peak = wall["ours"]["p50"] / len(index)
        waiting = _waiting(index, packs, args.workers, peak, max(1, args.repeats // 2))
    return {
        "workers": args.workers,
        "clips": {"count": args.clips, "seconds": SECONDS, "fps": RATE, "height": args.height, "packs": len(index)},
        "cpu_ms_per_clip": cpu,
        "cpu_overhead": {name: cpu[name]["p50"] / cpu[f"bare_{name}"]["p50"] - 1 for name in ("frames", "pixels")},
        "seconds_per_pass": wall,
        "wall_overhead": {name: wall["ours"]["p50"] / wall[name]["p50"] - 1 for name in ("bare_frames", "bare_pixels")},
        "waiting_at_half_peak": waiting,
        "load_average": os.getloadavg()[0],
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    cpu, wall, waiting = result["cpu_ms_per_clip"], result["seconds_per_pass"], result["waiting_at_half_peak"]
    lines = [
        f"CPU ms per clip, {name}: bare {cpu[f'bare_{name}']['p50']:.0f}, ours {cpu[name]['p50']:.0f} "
        f"({result['cpu_overhead'][name]:+.1%})"
        for name in ("frames", "pixels")
    ]
    passes = ", ".join(f"{name} {seconds['p50']:.2f}" for name, seconds in wall.items())
    more = ", ".join(f"{share:+.1%} of {name}" for name, share in result["wall_overhead"].items())
    return "\n".join(
        [
            *lines,
            f"s per pass with {result['workers']} workers: {passes} ({more})",
            f"waiting of a consumer at half the peak: {waiting['share']:.1%}, longest {waiting['longest']:.2f} s; load "
            f"average {result['load_average']:.1f}",
        ]
    )
