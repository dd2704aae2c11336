"""Files of a stage: parquet files whose media have the sizes of real ones, and of which only headers are real.

Station: mixture of a stage -> [parquet files] -> benchmarks of reading.  Pictures have 250 kB, clips 500 kB a second,
most of it padding behind a header that can be probed.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megatron_lance.data.sizes import ASPECT_RATIOS
from megatron_lance.data.synthetic import CLIP_FPS, STAGES
from megatron_lance.packing.rng import stream
from megatron_lance.packing.sample import Task
from megatron_lance.profiling.benchmarks.damaged_files import clip
from megatron_lance.profiling.benchmarks.prepack import WORDS
from megatron_lance.profiling.benchmarks.row_groups import CLIP_SECOND, PICTURE

GROUPS_PER_FILE = 4
IMAGE_TASKS = (Task.T2I, Task.I_EDIT, Task.S2I, Task.I2T)


def _padded(data: bytes, size: int, number: int) -> bytes:
    """A picture or clip with bytes behind it that readers of its header skip, unlike those of any other row."""
    padding = max(16, size - len(data))
    return data + padding.to_bytes(4, "big") + b"free" + number.to_bytes(8, "big") + bytes(padding - 16)


class _Media:
    """Drawn pictures and clips of few pixels, in the ratios of the buckets."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._seconds = np.clip(3.0 * np.exp(0.5 * rng.standard_normal(8)), 1.0, 6.0)
        self._clips: dict[tuple[int, int], bytes] = {}
        self._count = 0

    def image(self) -> bytes:
        """The next picture."""
        width, height = ASPECT_RATIOS[self._rng.integers(len(ASPECT_RATIOS))]
        file = io.BytesIO()
        Image.new("RGB", (4 * width, 4 * height), (90, 120, 30)).save(file, "JPEG")
        self._count += 1
        return _padded(file.getvalue(), PICTURE, self._count)

    def video(self) -> bytes:
        """The next clip."""
        ratio, length = int(self._rng.integers(len(ASPECT_RATIOS))), int(self._rng.integers(len(self._seconds)))
        if (ratio, length) not in self._clips:
            width, height = ASPECT_RATIOS[ratio]
            frames = round(CLIP_FPS * self._seconds[length])
            self._clips[ratio, length] = clip(frames, 8 * width, 8 * height, rate=CLIP_FPS)
        self._count += 1
        return _padded(self._clips[ratio, length], round(CLIP_SECOND * self._seconds[length]), self._count)

    def row(self, task: Task) -> dict[str, Any]:
        """The columns of the next row of a task."""
        caption = " ".join(WORDS[i] for i in self._rng.integers(len(WORDS), size=90))
        kind, one = ("image", self.image) if task in IMAGE_TASKS else ("video", self.video)
        if task.is_edit:
            return {f"input_{kind}_bytes": one(), "caption": caption, f"output_{kind}_bytes": one()}
        if task.is_subject_driven:
            shown = [self.image() for _ in range(self._rng.integers(1, 4))]
            kinds = [*["image"] * len(shown), "text", kind]
            return {"interleave_array": [*shown, caption.encode(), one()], "element_dtype_array": kinds}
        if not task.is_generation:
            return {f"{kind}_bytes": one(), "caption_i": "", "caption_q": "What can be seen?", "caption_a": caption}
        return {"caption": caption, f"{kind}_bytes": one()}


class _Files:
    """Writes the rows of a task, a row group at a time."""

    def __init__(self, folder: Path, group_bytes: float) -> None:
        folder.mkdir(parents=True)
        self._folder, self._group_bytes = folder, group_bytes
        self._rows: list[dict[str, Any]] = []
        self._bytes = self._groups = self.rows = 0
        self._writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any]) -> int:
        """Add a row; returns the bytes of its media."""
        values = [part for value in row.values() for part in (value if isinstance(value, list) else [value])]
        size = sum(len(value) for value in values if isinstance(value, bytes))
        self._rows.append(row)
        self._bytes, self.rows = self._bytes + size, self.rows + 1
        if self._bytes >= self._group_bytes:
            self.flush()
        return size

    def flush(self) -> None:
        """Write what waits as a row group."""
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows)
        if self._groups % GROUPS_PER_FILE == 0:
            self.close()
            path = self._folder / f"{self._groups // GROUPS_PER_FILE:05}.parquet"
            self._writer = pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False)
        assert self._writer is not None
        self._writer.write_table(table, row_group_size=len(self._rows))
        self._groups, self._bytes, self._rows = self._groups + 1, 0, []

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


def generate(folder: Path, stage: str, total_bytes: float, group_bytes: float, seed: int) -> dict[Task, int]:
    """Write the parquet files of a stage, a folder per task; returns the rows of each."""
    shares = STAGES[stage].shares()
    tasks, share = list(shares), np.array(list(shares.values()))
    media = _Media(stream(seed, "stage files"))
    files = {task: _Files(folder / task, group_bytes) for task in tasks}
    drawn, written = np.zeros(len(tasks)), 0
    while written < total_bytes or not drawn.all():
        chosen = int(np.argmax(share * (drawn.sum() + 1) - drawn))  # furthest behind its share
        drawn[chosen] += 1
        written += files[tasks[chosen]].add(media.row(tasks[chosen]))
    for one in files.values():
        one.flush()
        one.close()
    return {task: one.rows for task, one in files.items()}
