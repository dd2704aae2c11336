"""The pack index on disk: what its files hold, and writing them.

Station: packer -> [pack index format] -> pack index.  In: planned samples in groups.  Out: a folder with index.json
(version, hash and values of all that shaped the index, counts), packs.parquet (one row per sample, packs one after
another) and unusable.jsonl (rows left out).
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

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import DataConfig, ModelConfig
from megatron_lance.data.records import SourceFile
from megatron_lance.data.tasks import Dropout, MediaItem
from megatron_lance.packing.packer import mask_pairs
from megatron_lance.packing.sample import Sample, Task
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
PACKS_SCHEMA = pa.schema(
    [
        *[("pack", pa.int64()), ("sample_id", pa.string()), ("task", pa.string()), ("epoch", _INT)],
        *[("source", pa.string()), ("file", pa.string()), ("row", pa.int64())],
        *[("caption_dropped", pa.bool_()), ("conditions_dropped", _INTS)],
        *[("segments", pa.list_(_SEGMENT)), ("label_spans", pa.list_(_SPAN)), ("caption_span", _SPAN)],
        *[("media", pa.list_(_MEDIA)), ("mask_pairs", pa.int64())],
    ]
)


class PackIndexError(UserError):
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
    return {
        "data": data,
        "sources": sources,
        "source_order": list(sources),
        "tokenizer": tokenizer_sha256,
        "seed": seed,
        "model": model_values,
    }


def digest(shaping: Mapping[str, Any]) -> str:
    """Hash of `shaping_values`, 16 hex digits."""
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Each leaf that differs, as `name: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{name}.{k}" if name else k)]
    return [] if old == new else [f"{name}: index has {old!r}, run has {new!r}"]


def row_to_values(pack: int, row: PlannedRow) -> dict[str, Any]:
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


def row_from_values(values: Mapping[str, Any], sample_index: int, epoch_offset: int) -> PlannedRow:
    """The inverse of `row_to_values`."""
    segments = tuple(
        Segment(SegmentKind(s["kind"]), s["length"], tuple(s["grid"]) if s["grid"] else None, tuple(s["clean_frames"]))
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
        values = [row_to_values(number, row) for number, rows in enumerate(packs) for row in rows]
        pq.write_table(pa.Table.from_pylist(values, schema=PACKS_SCHEMA), partial / PACKS_FILE, store_schema=True)
        lines = [json.dumps(dict(row), ensure_ascii=False, sort_keys=True) for row in unusable]
        (partial / UNUSABLE_FILE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        tokens = sum(row.sample.length for rows in packs for row in rows)
        counts = {"packs": len(packs), "samples": len(values), "tokens": tokens, "unusable": len(lines)}
        header = {"version": VERSION, "hash": digest(shaping), "counts": counts, "shaping": shaping}
        text = json.dumps(header, indent=1, sort_keys=True, ensure_ascii=False)
        (partial / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
        _replace(partial, folder)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


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
    if old.exists():
        shutil.rmtree(old)
