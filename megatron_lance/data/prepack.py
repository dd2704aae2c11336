"""Prepack: plan all packs of a run from the metadata of its data.

Station: records -> tasks -> mixture -> packer -> [prepack] -> pack index.  In: a configuration.  Out: a pack index on
disk.  Rows are read once, in file order; a row that cannot be used is reported once with its cause and left out.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_lance.config.loader import ConfigError
from megatron_lance.config.schema import DataConfig, ModelConfig
from megatron_lance.data.media import MediaError, MediaInfo, probe
from megatron_lance.data.mixture import Draw, MixtureSource, mix
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.pack_index_format import PlannedRow, check_target, shaping_values, write_index
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.records import DataSetError, Media, Record, RecordError, RecordReader
from megatron_lance.data.tasks import draw_dropout, plan_sample
from megatron_lance.packing.packer import pack_lengths
from megatron_lance.packing.sample import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnusableRow:
    """A row left out: where it is, why, and how many samples the mixture had drawn from it."""

    source: str
    file: str
    row: int
    cause: str
    draws: int

    def __str__(self) -> str:
        """Where and why; most causes begin with the place."""
        place = f"{self.source}/{self.file}"
        return self.cause if self.cause.startswith(place) else f"{place} row {self.row}: {self.cause}"


@dataclass(frozen=True)
class _Context:
    """What planning a row needs."""

    config: DataConfig
    model: ModelConfig
    seed: int
    tokenizer: Tokenizer


def prepack(config: DataConfig, model: ModelConfig, seed: int, force: bool = False, progress: bool = True) -> PackIndex:
    """Write the pack index that a configuration describes.

    Args:
        config: the data section; `pack_index` is the folder to write.
        model: vocabulary rows and bounds of the latent position table.
        seed: the run's seed.
        force: replace an index that is already there.
        progress: draw a progress bar on stderr.

    Returns:
        The index, opened.

    Raises:
        ConfigError: if a setting is wrong.
        TokenizerError: if the tokenizer is.
        DataSetError: if a source is unusable as a whole, or none of the rows can be used.
        PackIndexError: if the index may not be written.
    """
    check_target(Path(config.pack_index), force)
    _check_settings(config)
    tokenizer = Tokenizer(config.tokenizer)
    tokenizer.check_fits(model.vocab_size)
    context = _Context(config, model, seed, tokenizer)
    readers = [RecordReader(source) for source in config.sources]
    row_starts = [[0, *accumulate(reader.row_count(f.name) for f in reader.files)] for reader in readers]
    counts = [
        MixtureSource(source.name, starts[-1], source.weight)
        for source, starts in zip(config.sources, row_starts, strict=True)
    ]
    for source, count in zip(config.sources, counts, strict=True):
        if not count.rows:
            raise DataSetError(f"data.sources {source.name}: {source.path} has no rows; remove it or give it data")
    draws = list(mix(counts, seed, config.epochs))
    planned, unusable = _plan_rows(context, readers, row_starts, draws, progress)
    rows = [planned[draw] for draw in draws if draw in planned]
    _report(unusable, len(draws), len(rows))
    if not rows:
        raise DataSetError(f"data.sources: none of the {len(unusable)} rows can be used; the first: {unusable[0]}")
    groups = pack_lengths([row.sample.length for row in rows], config.seq_length)
    files = {reader.source.name: reader.files for reader in readers}
    shaping = shaping_values(config, files, tokenizer.sha256, seed, model)
    lines: list[dict[str, Any]] = [vars(row) for row in unusable]
    write_index(config.pack_index, [[rows[i] for i in group] for group in groups], shaping, lines, force)
    return PackIndex.open(config.pack_index)


def _check_settings(config: DataConfig) -> None:
    """Raise ConfigError for settings that would fail on every row."""
    names = Counter(source.name for source in config.sources)
    if not names:
        raise ConfigError("data.sources: is empty; name at least one source")
    for name, times in names.items():
        if times > 1 or not name:
            raise ConfigError(
                f"data.sources: the name '{name}' stands {times} times; names must be unique and not empty"
            )
    if config.frame_sampling not in ("release", "trim"):
        raise ConfigError(f"data.frame_sampling '{config.frame_sampling}': must be release or trim")
    for source in config.sources:
        if source.frame_conditions not in ("first", "first_last"):
            raise ConfigError(
                f"data.sources {source.name}.frame_conditions '{source.frame_conditions}': must be first or first_last"
            )
        if Path(source.path).resolve() in Path(config.pack_index).resolve().parents:
            raise ConfigError(
                f"data.pack_index '{config.pack_index}': lies in the folder of data.sources {source.name} and would be "
                "read as data; name a folder outside it"
            )


def _plan_rows(
    context: _Context,
    readers: Sequence[RecordReader],
    row_starts: Sequence[Sequence[int]],
    draws: Sequence[Draw],
    progress: bool,
) -> tuple[dict[Draw, PlannedRow], list[UnusableRow]]:
    """Plan every drawn row, reading each once and in file order."""
    drawn: dict[tuple[int, int], list[Draw]] = defaultdict(list)
    for draw in draws:
        drawn[draw.source, draw.row].append(draw)
    planned: dict[Draw, PlannedRow] = {}
    unusable: list[UnusableRow] = []
    for (source, row), its_draws in tqdm(sorted(drawn.items()), desc="prepack", unit="row", disable=not progress):
        reader, starts = readers[source], row_starts[source]
        file_number = bisect_right(starts, row) - 1
        file, file_row = reader.files[file_number].name, row - starts[file_number]
        try:
            planned |= _plan_row(context, reader, file, file_row, its_draws)
        except (RecordError, MediaError) as error:
            unusable.append(UnusableRow(reader.source.name, file, file_row, str(error), len(its_draws)))
    return planned, unusable


def _plan_row(
    context: _Context, reader: RecordReader, file: str, row: int, draws: Sequence[Draw]
) -> dict[Draw, PlannedRow]:
    """The samples of one row, one per draw.

    Raises:
        RecordError, MediaError: if the row cannot be used.
    """
    record, source, config = reader.record(file, row), reader.source, context.config
    infos = _probe(reader, record)
    planned = {}
    for draw in draws:
        dropout = draw_dropout(config, record, Task(source.task), context.seed, draw.epoch)
        sample = plan_sample(record, source, config, context.model, context.tokenizer, infos, dropout)
        if sample.sample.length > config.seq_length:
            raise RecordError(
                f"{record.sample_id}: {sample.sample.length} tokens exceed data.seq_length {config.seq_length}; raise "
                "it, or lower data.vae_resolution, data.vit_resolution or data.max_seconds_generation"
            )
        planned[draw] = PlannedRow(sample.sample, draw.epoch, source.name, file, row, dropout, sample.media)
    return planned


def _probe(reader: RecordReader, record: Record) -> dict[str, MediaInfo]:
    """What the media of a record are, by element."""
    media = [element for element in (*record.inputs, record.target) if isinstance(element, Media)]
    return {m.element: probe(reader.media(record.file, record.row, m.element)) for m in media}


def _report(unusable: Sequence[UnusableRow], n_draws: int, n_samples: int) -> None:
    """Log each unusable row once, then the counts."""
    for row in unusable:
        logger.warning("unusable row (%d samples): %s", row.draws, row)
    if unusable:
        logger.warning("%d rows are unusable: %d of %d samples left out", len(unusable), n_draws - n_samples, n_draws)
