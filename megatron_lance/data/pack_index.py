"""The pack index: every pack of a run, planned from metadata and stored on disk.

Station: packer -> [pack index] -> loader and layout.  In: planned samples in groups.  Out: packs by number, with the
media each visual segment needs and the counts the losses are divided by (design: a pack is planned before it is read).

A folder holds index.json (version, hash and values of all that shaped the index, counts), packs.parquet (one row per
sample, packs one after another) and unusable.jsonl (rows left out).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_lance.config.schema import DataConfig, ModelConfig
from megatron_lance.data.records import SourceFile
from megatron_lance.data.tasks import Dropout, MediaItem
from megatron_lance.packing.packer import mask_pairs
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind

VERSION = 1
INDEX_FILE = "index.json"
PACKS_FILE = "packs.parquet"
UNUSABLE_FILE = "unusable.jsonl"

_INT = pa.int32()
_INTS = pa.list_(_INT)
_SPAN = pa.struct([("start", _INT), ("stop", _INT)])
_SEGMENT = pa.struct([("kind", pa.string()), ("length", _INT), ("grid", _INTS), ("clean_frames", _INTS)])
_MEDIA = pa.struct(
    [
        *[("segment_index", _INT), ("element", pa.string()), ("frames", _INTS), ("bucket", _INTS), ("size", _INTS)],
        ("encoder", pa.string()),
    ]
)
_SCHEMA = pa.schema(
    [
        *[("pack", pa.int64()), ("sample_id", pa.string()), ("task", pa.string()), ("epoch", _INT)],
        *[("source", pa.string()), ("file", pa.string()), ("row", pa.int64())],
        *[("caption_dropped", pa.bool_()), ("conditions_dropped", _INTS)],
        *[("segments", pa.list_(_SEGMENT)), ("label_spans", pa.list_(_SPAN)), ("caption_span", _SPAN)],
        *[("media", pa.list_(_MEDIA)), ("mask_pairs", pa.int64())],
    ]
)


class PackIndexError(ValueError):
    """A pack index that is absent, damaged, of another version, or made for another configuration."""


@dataclass(frozen=True)
class PlannedRow:
    """A sample as the index keeps it.

    Attributes:
        sample: its structure.
        epoch: pass over its source; addresses its randomness together with the sample id.
        source, file, row: the record it is made of.
        dropout: what was left out.
        media: one item per visual segment, in order.
    """

    sample: Sample
    epoch: int
    source: str
    file: str
    row: int
    dropout: Dropout
    media: tuple[MediaItem, ...]


@dataclass(frozen=True)
class PlannedPack:
    """A pack with all that is known of it before it is read.

    Attributes:
        number: the pack number it was asked for by.
        pack: samples and segments.
        rows: where each sample comes from.
        media: one item per visual segment, in pack order.
        mask_pairs: allowed (query, key) pairs of all samples.
    """

    number: int
    pack: Pack
    rows: tuple[PlannedRow, ...]
    media: tuple[MediaItem, ...]
    mask_pairs: int

    @property
    def epochs(self) -> tuple[int, ...]:
        """Epoch of each sample; with the sample id the address of its randomness."""
        return tuple(row.epoch for row in self.rows)

    @property
    def ce_rows(self) -> int:
        """Rows with a CE loss."""
        return self.pack.ce_rows

    @property
    def velocity_rows(self) -> int:
        """Rows with a velocity loss."""
        return self.pack.velocity_rows

    def __str__(self) -> str:
        """The pack as text, a line per sample and per segment."""
        lines = [
            f"pack {self.number}: {len(self.rows)} samples, {self.pack.length} of {self.pack.capacity} tokens "
            f"(fill {self.pack.length / self.pack.capacity:.1%}), gen {self.pack.gen_length}, CE rows {self.ce_rows}, "
            f"velocity rows {self.velocity_rows}, mask pairs {self.mask_pairs}"
        ]
        items = {(item.sample_index, item.segment_index): item for item in self.media}
        for placed in self.pack.placed_segments():
            row, segment = self.rows[placed.sample_index], placed.segment
            if placed.segment_index == 0:
                s = row.sample
                dropped = f" caption dropped {row.dropout.caption}, conditions dropped {list(row.dropout.conditions)}"
                lines.append(
                    f"  {s.sample_id} {s.task} epoch {row.epoch}: {s.length} tokens, caption {s.caption_span}, "
                    f"labels {list(s.label_spans)},{dropped}"
                )
            text = f"    [{placed.start:>6}, {placed.stop:>6}) {segment.kind:<5} {segment.length:>6}"
            if segment.grid is not None:
                item = items[placed.sample_index, placed.segment_index]
                size = f"{item.size[0]}x{item.size[1]}"
                clean = f", clean frames {list(segment.clean_frames)}" if segment.clean_frames else ""
                text += f"  grid {'x'.join(map(str, segment.grid))}{clean}, {item.element}"
                text += f" {len(item.frames)} frames at {size}"
            lines.append(text)
        return "\n".join(lines)


def shaping_values(
    config: DataConfig,
    files: Mapping[str, Sequence[SourceFile]],
    tokenizer_sha256: str,
    seed: int,
    model: ModelConfig,
) -> dict[str, Any]:
    """All that shapes an index, as plain JSON values.

    Where files lie, and how they are decoded, does not count; their names and sizes do.

    Args:
        config: the data section.
        files: of each source, by its name.
        tokenizer_sha256: of tokenizer.json.
        seed: the run's seed.
        model: bounds of the latent position table.
    """
    data = asdict(config)
    for name in ("pack_index", "tokenizer", "decode", "decode_threads"):
        del data[name]
    sources = {}
    for source in data.pop("sources"):
        del source["path"], source["raw_bytes_input"]
        source["files"] = {file.name: file.size for file in files[source["name"]]}
        sources[source["name"]] = source
    model_values = {name: getattr(model, name) for name in ("latent_position_frames", "latent_position_size")}
    return {"data": data, "sources": sources, "tokenizer": tokenizer_sha256, "seed": seed, "model": model_values}


def _digest(shaping: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Each leaf that differs, as `name: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{name}.{k}" if name else k)]
    return [] if old == new else [f"{name}: index has {old!r}, run has {new!r}"]


class PackIndex:
    """Packs by number.  Numbers go on behind the last planned pack: n means pack n mod len, in a later epoch.

    Attributes:
        folder: where it lies.
        shaping: what shaped it; see `shaping_values`.
        hash: digest of it.
        capacity: tokens of a pack.
        counts: samples, tokens, unusable rows.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], table: pa.Table) -> None:
        self.folder = folder
        self.shaping: dict[str, Any] = header["shaping"]
        self.hash: str = header["hash"]
        self.capacity: int = self.shaping["data"]["seq_length"]
        self.counts: dict[str, int] = header["counts"]
        self._table = table
        self._starts = np.searchsorted(table["pack"].to_numpy(), np.arange(self.counts["packs"] + 1))
        self._epoch_stride = int(pc.max(table["epoch"]).as_py()) + 1

    @classmethod
    def open(cls, folder: str | Path) -> PackIndex:
        """Open an index.

        Raises:
            PackIndexError: if there is none, it is damaged, or it has another version.
        """
        folder = Path(folder)
        again = "run tools/prepack.py" + (" --force" if folder.exists() else "")
        if not (folder / INDEX_FILE).is_file():
            raise PackIndexError(f"data.pack_index '{folder}': holds no {INDEX_FILE}; {again}")
        try:
            header = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            version = header["version"]
            if version != VERSION:
                remedy = "update this program or " if version > VERSION else ""
                raise PackIndexError(
                    f"data.pack_index '{folder}': has version {version}, this program reads {VERSION}; {remedy}{again}"
                )
            table = pq.read_table(folder / PACKS_FILE, memory_map=True)
            damage = _damage(header, table)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, pa.ArrowException, KeyError, TypeError) as error:
            damage = repr(error)
        if damage:
            raise PackIndexError(f"data.pack_index '{folder}': is damaged ({damage}); {again}")
        return cls(folder, header, table)

    def __len__(self) -> int:
        """Planned packs."""
        return self.counts["packs"]

    @property
    def seed(self) -> int:
        """The seed its order and its dropout were drawn with."""
        return int(self.shaping["seed"])

    def check(self, shaping: Mapping[str, Any]) -> None:
        """Raise PackIndexError unless the index was made for these `shaping_values`."""
        plain = json.loads(json.dumps(shaping))
        differences = _differences(self.shaping, plain)
        if differences:
            raise PackIndexError(
                f"data.pack_index '{self.folder}': has hash {self.hash}, the run has {_digest(plain)}; "
                f"{'; '.join(differences)}; run tools/prepack.py --force or use the index's configuration"
            )

    def global_batch(self, step: int, global_batch_size: int) -> tuple[int, ...]:
        """Numbers of the packs of a step; the last packs of an epoch share a batch with the first of the next.

        Args:
            step: from 0.
            global_batch_size: packs per step.
        """
        if step < 0 or global_batch_size < 1:
            raise ValueError(
                f"step {step} and global_batch_size {global_batch_size}: must be at least 0 and 1; correct the call"
            )
        return tuple(range(step * global_batch_size, (step + 1) * global_batch_size))

    def pack(self, number: int) -> PlannedPack:
        """A planned pack.

        Args:
            number: from 0, without an upper bound; behind the last pack the packs repeat with higher sample epochs.

        Raises:
            ValueError: if number is negative.
        """
        if number < 0:
            raise ValueError(f"pack {number}: numbers start at 0; correct the call")
        lap, at = divmod(number, len(self))
        start, stop = int(self._starts[at]), int(self._starts[at + 1])
        table = self._table.slice(start, stop - start)
        rows = tuple(
            _from_values(values, i, lap * self._epoch_stride) for i, values in enumerate(table.to_pylist())
        )
        return PlannedPack(
            number,
            Pack(tuple(row.sample for row in rows), self.capacity),
            rows,
            tuple(item for row in rows for item in row.media),
            int(pc.sum(table["mask_pairs"]).as_py()),
        )


def _damage(header: Mapping[str, Any], table: pa.Table) -> str:
    """What is wrong with an index; empty if nothing is."""
    if not table.schema.equals(_SCHEMA):
        return f"{PACKS_FILE} has columns {', '.join(table.schema.names)} of other types than written"
    if table.num_rows != header["counts"]["samples"]:
        return f"{PACKS_FILE} has {table.num_rows} samples, {INDEX_FILE} says {header['counts']['samples']}"
    if _digest(header["shaping"]) != header["hash"]:
        return f"the values in {INDEX_FILE} hash to {_digest(header['shaping'])}, it says {header['hash']}"
    return ""


def _to_values(pack: int, row: PlannedRow) -> dict[str, Any]:
    """A row of packs.parquet."""
    sample = row.sample
    span = sample.caption_span
    return {
        "pack": pack,
        "sample_id": sample.sample_id,
        "task": str(sample.task),
        "epoch": row.epoch,
        "source": row.source,
        "file": row.file,
        "row": row.row,
        "caption_dropped": row.dropout.caption,
        "conditions_dropped": list(row.dropout.conditions),
        "segments": [asdict(segment) for segment in sample.segments],
        "label_spans": [{"start": start, "stop": stop} for start, stop in sample.label_spans],
        "caption_span": None if span is None else {"start": span[0], "stop": span[1]},
        "media": [{name: getattr(item, name) for name in _MEDIA.names} for item in row.media],
        "mask_pairs": mask_pairs(sample.segments),
    }


def _from_values(values: Mapping[str, Any], sample_index: int, epoch_offset: int) -> PlannedRow:
    """The inverse of `_to_values`."""
    segments = tuple(
        Segment(
            SegmentKind(s["kind"]), s["length"], tuple(s["grid"]) if s["grid"] else None, tuple(s["clean_frames"])
        )
        for s in values["segments"]
    )
    span = values["caption_span"]
    sample = Sample(
        values["sample_id"],
        Task(values["task"]),
        segments,
        tuple((s["start"], s["stop"]) for s in values["label_spans"]),
        None if span is None else (span["start"], span["stop"]),
    )
    where = (values["source"], values["file"], values["row"])
    media = tuple(
        MediaItem(
            *(sample_index, m["segment_index"], *where, m["element"]),
            *(tuple(m["frames"]), tuple(m["bucket"]), tuple(m["size"]), m["encoder"]),
        )
        for m in values["media"]
    )
    dropout = Dropout(values["caption_dropped"], tuple(values["conditions_dropped"]))
    return PlannedRow(sample, values["epoch"] + epoch_offset, *where, dropout, media)


def write_index(
    folder: str | Path,
    packs: Sequence[Sequence[PlannedRow]],
    shaping: Mapping[str, Any],
    unusable: Iterable[Mapping[str, Any]],
    force: bool = False,
) -> None:
    """Write an index; the folder appears complete or not at all.

    Args:
        folder: to make.
        packs: samples of each pack, in order.
        shaping: from `shaping_values`.
        unusable: rows left out, for unusable.jsonl.
        force: replace an index that is already there.

    Raises:
        PackIndexError: if there is nothing to write, the folder exists and force is not set, or it is no pack index.
    """
    folder = Path(folder)
    check_target(folder, force)
    if not packs:
        raise PackIndexError(f"data.pack_index '{folder}': no usable sample to pack; see the unusable rows")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        values = [_to_values(number, row) for number, rows in enumerate(packs) for row in rows]
        pq.write_table(pa.Table.from_pylist(values, schema=_SCHEMA), partial / PACKS_FILE, store_schema=True)
        lines = [json.dumps(dict(row), ensure_ascii=False, sort_keys=True) for row in unusable]
        (partial / UNUSABLE_FILE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        tokens = sum(row.sample.length for rows in packs for row in rows)
        counts = {"packs": len(packs), "samples": len(values), "tokens": tokens, "unusable": len(lines)}
        header = {"version": VERSION, "hash": _digest(shaping), "counts": counts, "shaping": shaping}
        text = json.dumps(header, indent=1, sort_keys=True, ensure_ascii=False)
        (partial / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(folder: Path, force: bool) -> None:
    """Raise PackIndexError unless an index may be written to `folder`."""
    if not folder.name:
        raise PackIndexError("data.pack_index: is empty; name the folder to write")
    if not folder.exists():
        return
    if not force:
        raise PackIndexError(f"data.pack_index '{folder}': exists; give --force to overwrite it")
    if not (folder / INDEX_FILE).is_file():
        raise PackIndexError(f"data.pack_index '{folder}': exists and is no pack index; name another folder")


def _replace(partial: Path, folder: Path) -> None:
    """Move a complete folder into place, and the one before it away."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
