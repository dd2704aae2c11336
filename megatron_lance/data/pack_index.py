"""The pack index: every pack of a run, planned from metadata.

Station: packer -> [pack index] -> loader and layout.  In: a folder written by tools/prepack.py.  Out: packs by number,
with the media each visual segment needs and the counts the losses are divided by (design: a pack is planned before it
is read).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_lance.data.facts import RowFacts
from megatron_lance.data.pack_index_format import (
    BATCH,
    INDEX_FILE,
    PACKS_FILE,
    PACKS_SCHEMA,
    SAMPLES_FILE,
    SAMPLES_SCHEMA,
    VERSION,
    VISUAL_KINDS,
    PackIndexError,
    PlannedRow,
    differences,
    digest,
)
from megatron_lance.data.sample_plan import Place, Sizing, plan_sample
from megatron_lance.data.tasks import Dropout, MediaItem
from megatron_lance.packing.sample import Pack, Task

_TOKEN_COLUMNS = ("tokens", *(f"{kind}_tokens" for kind in VISUAL_KINDS))
RECENT_PACKS = 256
"""Packs kept as values; a step asks for each of its packs several times."""


@dataclass(frozen=True)
class PlannedPack:
    """A pack with all that is known of it before it is read.

    Attributes:
        number: the pack number it was asked for by.
        pack: samples and segments.
        rows: where each sample comes from.
        media: one item per visual segment, in pack order.
        mask_pairs: allowed (query, key) pairs of all samples.
        cost: work of a layer, in mask pairs.
    """

    number: int
    pack: Pack
    rows: tuple[PlannedRow, ...]
    media: tuple[MediaItem, ...]
    mask_pairs: int
    cost: int

    @cached_property
    def known_media(self) -> frozenset[MediaItem]:
        """The media items as a set."""
        return frozenset(self.media)

    @property
    def epochs(self) -> tuple[int, ...]:
        """Epoch of each sample; with the sample id the address of its randomness."""
        return tuple(row.epoch for row in self.rows)

    @property
    def sources(self) -> tuple[str, ...]:
        """Name of each sample's source."""
        return tuple(row.source for row in self.rows)

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


class PackIndex:
    """Packs by number.  Numbers go on behind the last planned pack: n means pack n mod len, in a later epoch.

    Attributes:
        folder: where it lies.
        shaping: what shaped it; see `shaping_values`.
        hash: digest of it.
        capacity: tokens of a pack.
        counts: packs, samples, tokens, unusable rows, substituted samples.
        for_validation: whether it was opened to validate on, see `open`.
    """

    def __init__(
        self, folder: Path, header: Mapping[str, Any], packs: _Table, samples: _Table, for_validation: bool = False
    ) -> None:
        self.folder, self.for_validation = folder, for_validation
        self.shaping: dict[str, Any] = header["shaping"]
        self.hash: str = header["hash"]
        self.capacity: int = self.shaping["data"]["seq_length"]
        self.counts: dict[str, int] = header["counts"]
        self._packs, self._samples = packs, samples
        self._sizing = _sizing(self.shaping)
        self._sources = [(name, self.shaping["sources"][name]) for name in self.shaping["source_order"]]
        self._files = [sorted(source["files"]) for _, source in self._sources]
        self._recent = lru_cache(maxsize=RECENT_PACKS)(self._read)

    @classmethod
    def open(cls, folder: str | Path, for_validation: bool = False) -> PackIndex:
        """Open an index.

        Args:
            folder: that holds it.
            for_validation: errors name it as validation.pack_index, and `PackReader` wants held-out rows in it.

        Raises:
            PackIndexError: if there is none, it is damaged, or it has another version.
        """
        folder = Path(folder)
        setting, program = _names(for_validation)
        again = f"run {program} --force"
        if not (folder / INDEX_FILE).is_file():
            raise PackIndexError(
                f"{setting} '{folder}': holds no {INDEX_FILE}; run {program} or name the folder it wrote"
            )
        try:
            header = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            version = header["version"]
            if version != VERSION:
                remedy = "update this program or " if version > VERSION else ""
                raise PackIndexError(
                    f"{setting} '{folder}': has version {version}, this program reads {VERSION}; {remedy}{again}"
                )
            packs, samples = _Table(folder / PACKS_FILE), _Table(folder / SAMPLES_FILE)
            damage = _damage(header, packs, samples)
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, pa.ArrowException, KeyError, TypeError) as error:
            damage = repr(error)
        if damage:
            raise PackIndexError(f"{setting} '{folder}': is damaged ({damage}); {again}")
        return cls(folder, header, packs, samples, for_validation)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy made by pickling maps the files anew."""
        return _open_again, (self.folder, self.for_validation, self.hash)

    def __len__(self) -> int:
        """Planned packs."""
        return self.counts["packs"]

    @property
    def seed(self) -> int:
        """The seed its order and its dropout were drawn with."""
        return int(self.shaping["seed"])

    def check(self, shaping: Mapping[str, Any]) -> None:
        """Raise PackIndexError unless the index was made for these `shaping_values`.

        The global batch size need not agree: it decides which packs were formed together, not what they are.
        """
        plain = json.loads(json.dumps(shaping)) | {"global_batch_size": self.shaping["global_batch_size"]}
        differing = differences(self.shaping, plain)
        if differing:
            setting, program = _names(self.for_validation)
            raise PackIndexError(
                f"{setting} '{self.folder}': has hash {self.hash}, the run has {digest(plain)}; "
                f"{'; '.join(differing)}; run {program} --force or use the index's configuration"
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
        return self._recent(number)

    def tokens_before(self, number: int) -> dict[str, int]:
        """Tokens by kind (text, vit, clean, noise) of all packs below a number, from 0 and without an upper bound."""
        lap, at = divmod(number, len(self))
        batch, rows = divmod(at, BATCH)
        sums = lap * self._token_sums[-1] + self._token_sums[batch]
        if rows:
            sums += self._packs.sums(batch, rows, _TOKEN_COLUMNS)
        every, *visual = sums.tolist()
        return {"text": every - sum(visual), **dict(zip(map(str, VISUAL_KINDS), visual, strict=True))}

    @cached_property
    def _token_sums(self) -> np.ndarray:
        """Int64 [record batches + 1, columns]: sums of the record batches before each."""
        return np.cumsum(
            [np.zeros(len(_TOKEN_COLUMNS), np.int64)]
            + [self._packs.sums(batch, BATCH, _TOKEN_COLUMNS) for batch in range(-(-len(self) // BATCH))],
            axis=0,
        )

    def _read(self, number: int) -> PlannedPack:
        lap, at = divmod(number, len(self))
        (pack,) = self._packs.rows(at, 1)
        rows = [
            self._row(values, i, lap * self.counts["epochs"])
            for i, values in enumerate(self._samples.rows(pack["start"], pack["samples"]))
        ]
        return PlannedPack(
            number,
            Pack(tuple(row.sample for row in rows), self.capacity),
            tuple(rows),
            tuple(item for row in rows for item in row.media),
            pack["mask_pairs"],
            pack["mask_pairs"] + round(self.shaping["model"]["token_cost"] * pack["tokens"]),
        )

    def _row(self, values: dict[str, Any], sample_index: int, epoch_offset: int) -> PlannedRow:
        """A row of samples.arrow as a sample of a pack."""
        name, source = self._sources[values["source"]]
        place = Place(name, self._files[values["source"]][values["file"]], values["row"])
        dropout = Dropout(values["caption_dropped"], tuple(values["conditions_dropped"]))
        own, stands_for = place.sample_id, values["stands_for"]
        sample, media = plan_sample(
            RowFacts.of(values),
            place,
            f"{own} for {stands_for}" if stands_for else own,
            Task(source["task"]),
            source["frame_conditions"],
            self._sizing,
            dropout,
        )
        items = tuple(replace(item, sample_index=sample_index) for item in media)
        epoch = values["epoch"] + epoch_offset
        return PlannedRow(sample, epoch, place.source, place.file, place.row, dropout, items)


class _Table:
    """An Arrow file of record batches of BATCH rows, memory-mapped: only the rows asked for are read."""

    def __init__(self, path: Path) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batch = lru_cache(maxsize=64)(self._file.get_batch)
        self.schema: pa.Schema = self._file.schema
        whole = self._file.num_record_batches - 1
        self.num_rows: int = whole * BATCH + self._batch(whole).num_rows if whole >= 0 else 0

    def sums(self, batch: int, rows: int, names: Sequence[str]) -> np.ndarray:
        """Int64 [names]: sums of columns over the first rows of a record batch."""
        part = self._batch(batch).slice(0, rows)
        return np.array([part.column(name).to_numpy().sum(dtype=np.int64) for name in names])

    def rows(self, start: int, count: int) -> list[dict[str, Any]]:
        """Rows [start, start + count) as dicts."""
        found: list[dict[str, Any]] = []
        while count:
            number, at = divmod(start, BATCH)
            part = self._batch(number).slice(at, min(count, BATCH - at)).to_pylist()
            found += part
            start, count = start + len(part), count - len(part)
        return found


def _open_again(folder: Path, for_validation: bool, known: str) -> PackIndex:
    """An index that is open in another process.

    Raises:
        PackIndexError: if it was written anew meanwhile.
    """
    index = PackIndex.open(folder, for_validation)
    if index.hash != known:
        setting, _ = _names(for_validation)
        raise PackIndexError(
            f"{setting} '{folder}': has hash {index.hash}, the run began with {known}; it was written anew: start the "
            "run again"
        )
    return index


def _names(for_validation: bool) -> tuple[str, str]:
    """The setting that names an index, and the command that writes it."""
    program = "tools/prepack.py"
    return ("validation.pack_index", f"{program} --held-out") if for_validation else ("data.pack_index", program)


def _sizing(shaping: Mapping[str, Any]) -> Sizing:
    """The sizes that an index was planned with."""
    names = [f.name for f in fields(Sizing) if not f.name.startswith("position_")]
    model = shaping["model"]
    bounds = {"position_frames": model["latent_position_frames"], "position_size": model["latent_position_size"]}
    read: dict[str, Any] = {name: shaping["data"][name] for name in names}
    sides = {name: tuple(value) for name, value in read.items() if isinstance(value, list)}  # JSON has no tuples
    return Sizing(**{**read, **sides, **bounds})


def _damage(header: Mapping[str, Any], packs: _Table, samples: _Table) -> str:
    """What is wrong with an index; empty if nothing is."""
    for name, table, schema in ((PACKS_FILE, packs, PACKS_SCHEMA), (SAMPLES_FILE, samples, SAMPLES_SCHEMA)):
        if not table.schema.equals(schema):
            return f"{name} has columns {', '.join(table.schema.names)} of other types than written"
        what = name.partition(".")[0]
        if table.num_rows != header["counts"][what]:
            return f"{name} has {table.num_rows} {what}, {INDEX_FILE} says {header['counts'][what]}"
    if digest(header["shaping"]) != header["hash"]:
        return f"the values in {INDEX_FILE} hash to {digest(header['shaping'])}, it says {header['hash']}"
    return ""
