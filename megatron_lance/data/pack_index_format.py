"""The pack index on disk: what its files hold, and writing them.

Station: packer -> [pack index format] -> pack index.  In: planned samples, pack by pack.  Out: a folder with index.json
(version, hash and values of all that shaped the index, counts), samples.arrow (a row per sample, packs one after
another: where it comes from, what was dropped, the facts of its row), packs.arrow (a row per pack) and unusable.jsonl
(rows that cannot be used, each with its cause and its substitutes).  The tables are uncompressed Arrow files, read
through a memory map.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import DataConfig, ModelConfig
from megatron_lance.data.facts import FACTS_SCHEMA, RowFacts
from megatron_lance.data.records import SourceFile
from megatron_lance.data.sample_plan import Place
from megatron_lance.data.step_shape import token_cost
from megatron_lance.data.tasks import Dropout, MediaItem
from megatron_lance.packing.packer import mask_pairs
from megatron_lance.packing.sample import Sample
from megatron_lance.packing.segment import SegmentKind

VERSION = 7
"""Raised whenever the same configuration would give another index."""
INDEX_FILE = "index.json"
PACKS_FILE = "packs.arrow"
SAMPLES_FILE = "samples.arrow"
UNUSABLE_FILE = "unusable.jsonl"
BATCH = 1 << 16
"""Rows of a record batch of the two tables."""
RUN_TIME = (
    *("pack_index", "facts", "tokenizer"),
    *("decode", "decode_threads", "workers", "steps_ahead", "media_seconds", "encoding_cache"),
    *("row_group_cache", "row_group_cache_gb"),
)
"""Fields of the data section that do not shape an index."""

VISUAL_KINDS = (SegmentKind.VIT, SegmentKind.CLEAN, SegmentKind.NOISE)
"""Kinds of content whose tokens are counted for each pack; the rest is text, vision markers included."""

_INT = pa.int32()
PACKS_SCHEMA = pa.schema(
    [
        *[("start", pa.int64()), ("samples", _INT), ("tokens", _INT), ("mask_pairs", pa.int64())],
        *[("ce_rows", _INT), ("velocity_rows", _INT)],
        *[(f"{kind}_tokens", _INT) for kind in VISUAL_KINDS],
    ]
)
SAMPLES_SCHEMA = pa.schema(
    [
        *[("source", pa.int16()), ("file", _INT), ("row", pa.int64()), ("epoch", _INT)],
        *[("caption_dropped", pa.bool_()), ("conditions_dropped", pa.list_(pa.int8())), ("stands_for", pa.string())],
        *FACTS_SCHEMA,
    ]
)


class PackIndexError(UserError):
    """A pack index that is absent, damaged, of another version, or made for another configuration."""


@dataclass(frozen=True)
class PlannedRow:
    """A sample as the index keeps it.

    Attributes:
        sample: its structure; a substitute's id names the row it is made of and the unusable one it stands in for.
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
    global_batch_size: int | None = None,
    held_out: bool = False,
) -> dict[str, Any]:
    """All that shapes an index, as plain JSON values.

    Where files lie, and how they are decoded, does not count; their names and sizes do.

    Args:
        config: the data section.
        files: of each source, by its name.
        tokenizer_sha256: of tokenizer.json.
        seed: the run's seed.
        model: bounds of the latent position table, and sizes that the cost of a pack depends on.
        global_batch_size: packs that are formed together; None where a run with another number may read the index.
        held_out: whether it holds the rows of data.validation_fraction, and no others.
    """
    data = asdict(config)
    for name in RUN_TIME:
        del data[name]
    sources = {}
    for source in data.pop("sources"):
        del source["path"], source["raw_bytes_input"]
        source["files"] = {file.name: file.size for file in files[source["name"]]}
        sources[source["name"]] = source
    model_values = {name: getattr(model, name) for name in ("latent_position_frames", "latent_position_size")}
    model_values["token_cost"] = token_cost(model)
    return {
        "version": VERSION,
        "data": data,
        "sources": sources,
        "source_order": list(sources),
        "tokenizer": tokenizer_sha256,
        "seed": seed,
        "model": model_values,
        "global_batch_size": global_batch_size,
        "held_out": held_out,
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


@dataclass(frozen=True)
class IndexRow:
    """A sample as the index stores it: the facts of a row, and what was drawn for it.

    Attributes:
        facts: of the row.
        place: of the row.
        epoch: pass over its source.
        dropout: what is left out.
        stands_for: sample id of the unusable row it stands in for; empty if none.
    """

    facts: RowFacts
    place: Place
    epoch: int
    dropout: Dropout
    stands_for: str = ""

    @property
    def sample_id(self) -> str:
        """Of the sample; a substitute has one of its own."""
        return f"{self.place.sample_id} for {self.stands_for}" if self.stands_for else self.place.sample_id


class IndexWriter:
    """Writes an index pack by pack; the folder appears complete, when it is finished, or not at all.

    Args:
        folder: to make.
        files: names of the files of each source, by its name, both in order; samples refer to them by number.
        force: replace an index that is already there.

    Raises:
        PackIndexError: if the folder exists and force is not set, or it is no pack index.
    """

    def __init__(self, folder: str | Path, files: Mapping[str, Sequence[str]], force: bool = False) -> None:
        self._folder = Path(folder)
        check_target(self._folder, force)
        self._partial = self._folder.with_name(f".{self._folder.name}.partial-{os.getpid()}")
        self._sources = {name: number for number, name in enumerate(files)}
        self._files = {(source, name): i for source, names in files.items() for i, name in enumerate(names)}
        self._packs: list[dict[str, int]] = []
        self._samples: list[dict[str, Any]] = []
        self._counts = {"packs": 0, "samples": 0, "tokens": 0, "epochs": 0}

    def __enter__(self) -> IndexWriter:
        """Open the two tables.

        Raises:
            PackIndexError: if the folder cannot be made.
        """
        shutil.rmtree(self._partial, ignore_errors=True)  # of a process with our number that was killed
        try:
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise PackIndexError(
                f"data.pack_index '{self._folder}': cannot be written ({error.strerror}); name another folder"
            ) from error
        self._stack = ExitStack()
        self._stack.callback(shutil.rmtree, self._partial, ignore_errors=True)
        self._tables = {
            schema: self._stack.enter_context(pa.ipc.new_file(str(self._partial / name), schema))
            for name, schema in ((PACKS_FILE, PACKS_SCHEMA), (SAMPLES_FILE, SAMPLES_SCHEMA))
        }
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what is not finished."""
        self._stack.close()

    def add(self, pack: Sequence[tuple[IndexRow, Sample]]) -> None:
        """Add the next pack."""
        samples = [sample for _, sample in pack]
        tokens = sum(sample.length for sample in samples)
        self._packs.append(
            {
                **{"start": self._counts["samples"], "samples": len(pack), "tokens": tokens},
                "mask_pairs": sum(mask_pairs(sample.segments) for sample in samples),
                "ce_rows": sum(sample.ce_rows for sample in samples),
                "velocity_rows": sum(sample.velocity_rows for sample in samples),
                **{
                    f"{kind}_tokens": sum(s.content_length for each in samples for s in each.segments if s.kind is kind)
                    for kind in VISUAL_KINDS
                },
            }
        )
        self._samples += [self._values(row) for row, _ in pack]
        self._counts["packs"] += 1
        self._counts["samples"] += len(pack)
        self._counts["tokens"] += tokens
        self._counts["epochs"] = max(self._counts["epochs"], *(row.epoch + 1 for row, _ in pack))
        self._flush(BATCH)

    def _values(self, row: IndexRow) -> dict[str, Any]:
        place = row.place
        return {
            **{"source": self._sources[place.source], "file": self._files[place.source, place.file], "row": place.row},
            **{"epoch": row.epoch, "caption_dropped": row.dropout.caption, "stands_for": row.stands_for or None},
            **{"conditions_dropped": row.dropout.conditions, **row.facts.values()},
        }

    def _flush(self, least: int) -> None:
        """Write whole batches; what is less than `least` waits."""
        for schema, rows in ((PACKS_SCHEMA, self._packs), (SAMPLES_SCHEMA, self._samples)):
            while len(rows) >= least and rows:
                self._tables[schema].write_batch(pa.RecordBatch.from_pylist(rows[:BATCH], schema=schema))
                del rows[:BATCH]

    def finish(self, shaping: Mapping[str, Any], unusable: Sequence[Mapping[str, Any]]) -> None:
        """Write what is left and move the folder into place.

        Args:
            shaping: from `shaping_values`.
            unusable: rows that cannot be used, for unusable.jsonl; `substitutes` lists what stands in for each.

        Raises:
            PackIndexError: if no pack was added.
        """
        if not self._counts["packs"]:
            raise PackIndexError(f"data.pack_index '{self._folder}': no usable sample to pack; see the unusable rows")
        self._flush(1)
        for table in self._tables.values():
            table.close()
        lines = [json.dumps(dict(row), ensure_ascii=False, sort_keys=True) for row in unusable]
        (self._partial / UNUSABLE_FILE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        counts = self._counts | {"unusable": len(lines), "substituted": sum(len(r["substitutes"]) for r in unusable)}
        header = {"version": VERSION, "hash": digest(shaping), "counts": counts, "shaping": shaping}
        text = json.dumps(header, indent=1, sort_keys=True, ensure_ascii=False)
        (self._partial / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
        _replace(self._partial, self._folder)


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
