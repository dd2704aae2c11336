"""Prepack: plan all packs of a run from the metadata of its data.

Station: records -> facts -> mixture -> packer -> [prepack] -> pack index.  In: a configuration.  Out: a pack index on
disk, written as its packs are formed.  A drawn row that cannot be used is named once with its cause, and each draw of
it gets a usable row of the same source instead, so that epochs keep their sizes and sources their shares.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_lance.config.loader import ConfigError
from megatron_lance.config.schema import DataConfig, ModelConfig
from megatron_lance.data.collect import Inquiry, collect, read_footers
from megatron_lance.data.facts import FileFacts
from megatron_lance.data.mixture import Draw, MixtureSource, mix
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.pack_index_format import IndexRow, IndexWriter, check_target, shaping_values
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.records import DataSetError, RecordError, RecordReader
from megatron_lance.data.sample_plan import Place, Sizing, plan_sample
from megatron_lance.data.sizes import vae_size, vit_size
from megatron_lance.data.step_shape import step_shape
from megatron_lance.data.tasks import Dropout, draw_dropout
from megatron_lance.packing.packer import mask_pairs
from megatron_lance.packing.rng import stream
from megatron_lance.packing.sample import Sample, Task
from megatron_lance.packing.step_balance import IntArray
from megatron_lance.packing.step_packer import SampleCost, pack_steps

logger = logging.getLogger(__name__)

_TRIES = 64
"""Rows drawn for a substitute before all are gone through."""
_NAMED = 50
"""Unusable rows of a source that the log names; all of them are in the index."""

RowKey = tuple[int, int]
"""Number of a source, and of a row counted over its files."""


@dataclass(frozen=True)
class UnusableRow:
    """A row that cannot be used.

    Attributes:
        place: where it is.
        cause: why it cannot be used.
        substitutes: sample ids taken in its place, one per draw, in the order of the draws.
    """

    place: Place
    cause: str
    substitutes: list[str]

    def __str__(self) -> str:
        """Where and why; most causes begin with the place."""
        file = f"{self.place.source}/{self.place.file}"
        return self.cause if self.cause.startswith(file) else f"{file} row {self.place.row}: {self.cause}"


@dataclass(frozen=True)
class _Source:
    """A source whose rows are counted over its files.

    Attributes:
        reader: lists its files.
        starts: first row of each file, and their sum.
        group_starts: first row of each row group, and the number of rows.
        facts: of each file.
        chosen: rows that may be drawn, ascending; None: all.
    """

    reader: RecordReader
    starts: tuple[int, ...]
    group_starts: tuple[int, ...]
    facts: tuple[FileFacts, ...]
    chosen: IntArray | None

    @property
    def name(self) -> str:
        return self.reader.source.name

    @property
    def rows(self) -> int:
        """Rows that may be drawn."""
        return self.starts[-1] if self.chosen is None else len(self.chosen)

    @property
    def groups(self) -> tuple[int, ...]:
        """Rows of each row group that may be drawn; those without any are left out."""
        bounds = self.group_starts if self.chosen is None else np.searchsorted(self.chosen, self.group_starts).tolist()
        return tuple(stop - start for start, stop in pairwise(bounds) if stop > start)

    def row(self, number: int) -> int:
        """The row of a number below `rows`."""
        return number if self.chosen is None else int(self.chosen[number])

    def find(self, row: int) -> tuple[FileFacts, Place]:
        """The facts of the row's file, and where it is."""
        number = bisect_right(self.starts, row) - 1
        return self.facts[number], Place(self.name, self.reader.files[number].name, row - self.starts[number])


def is_held_out(file: str, row: int, fraction: float) -> bool:
    """Whether a row belongs to the validation rows: its own name decides, whatever else is in the data set.

    The source's name is no part of it, so a file that two sources share (t2v and i2v) is split alike for both.
    """
    digest = hashlib.blake2b(f"{file}/{row}".encode(), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def prepack(
    config: DataConfig,
    model: ModelConfig,
    seed: int,
    global_batch_size: int,
    force: bool = False,
    progress: bool = True,
    workers: int = 1,
    held_out: bool = False,
) -> PackIndex:
    """Write the pack index that a configuration describes.

    Args:
        config: the data section; `pack_index` is the folder to write.
        model: vocabulary rows and bounds of the latent position table.
        seed: the run's seed.
        global_batch_size: packs of a step, which are formed together.
        force: replace an index that is already there.
        progress: draw progress bars on stderr.
        workers: processes that probe data files.
        held_out: plan the rows of `validation_fraction` instead of the others.

    Returns:
        The index, opened.

    Raises:
        ConfigError: if a setting is wrong.
        TokenizerError: if the tokenizer is.
        DataSetError: if a source is unusable as a whole, or none of its rows can be used.
        PackIndexError: if the index may not be written.
    """
    check_target(Path(config.pack_index), force)
    _check_settings(config, held_out)
    shape = step_shape(config, model, global_batch_size)
    tokenizer = Tokenizer(config.tokenizer)
    tokenizer.check_fits(model.vocab_size)
    readers = [RecordReader(source) for source in config.sources]
    folder = Path(config.facts) if config.facts else Path(f"{Path(config.pack_index)}.facts")
    inquiry = Inquiry(config.sources, config.prompts, config.tokenizer, folder)
    footers = read_footers(readers, progress)
    for number, reader in enumerate(readers):
        if not any(footers[number, file.name].rows for file in reader.files):
            raise DataSetError(
                f"data.sources {reader.source.name}: {reader.source.path} has no rows; remove it or give it data"
            )
    paths = collect(inquiry, tokenizer, readers, footers, workers, progress)
    sources = []
    for number, reader in enumerate(readers):
        group_rows = [footers[number, file.name].group_rows for file in reader.files]
        rows = [sum(groups) for groups in group_rows]
        facts = tuple(FileFacts(paths[number, file.name]) for file in reader.files)
        chosen = _chosen(reader, rows, config.validation_fraction, held_out)
        group_starts = (0, *accumulate(chain.from_iterable(group_rows)))
        sources.append(_Source(reader, (0, *accumulate(rows)), group_starts, facts, chosen))
    planner = _Planner(config, model, seed, sources)
    counts = _mixture(sources, config.validation_fraction, held_out)
    files = {reader.source.name: reader.files for reader in readers}
    with IndexWriter(config.pack_index, {n: [f.name for f in fs] for n, fs in files.items()}, force) as writer:
        waiting: dict[int, tuple[IndexRow, Sample]] = {}
        draws = tqdm(
            mix(counts, seed, config.epochs, config.mixing_row_groups),
            desc="plan",
            unit="sample",
            total=config.epochs * sum(count.rows for count in counts if count.weight > 0),
            disable=not progress,
        )
        for step in pack_steps(planner.costs(draws, waiting), shape, seed):
            for pack in step:
                writer.add([waiting.pop(number) for number in pack])
        shaping = shaping_values(config, files, tokenizer.sha256, seed, model, global_batch_size, held_out)
        writer.finish(shaping, planner.unusable_lines())
    return PackIndex.open(config.pack_index)


def _chosen(reader: RecordReader, rows: Sequence[int], fraction: float, held_out: bool) -> IntArray | None:
    """Rows of a source that may be drawn; None: all.

    Raises:
        DataSetError: if there is none to train on.
    """
    if not fraction:
        return None
    name = reader.source.name
    held = (
        is_held_out(f.name, row, fraction) for f, count in zip(reader.files, rows, strict=True) for row in range(count)
    )
    chosen = np.flatnonzero(np.fromiter(held, bool, sum(rows)) == held_out)
    if not len(chosen) and not held_out:
        raise DataSetError(
            f"data.sources {name}: data.validation_fraction {fraction} leaves none of its {sum(rows)} rows for "
            "training; lower it or give the source more data"
        )
    return chosen


def _check_settings(config: DataConfig, held_out: bool) -> None:
    """Raise ConfigError for settings that would fail on every row."""
    names = Counter(source.name for source in config.sources)
    if not names:
        raise ConfigError("data.sources: is empty; name at least one source")
    for name, times in names.items():
        if times > 1 or not name:
            raise ConfigError(
                f"data.sources: the name '{name}' stands {times} times; names must be unique and not empty"
            )
    if held_out and not config.validation_fraction:
        raise ConfigError("data.validation_fraction 0.0: holds no row out; set the share of rows to validate on")
    if config.frame_sampling not in ("release", "trim"):
        raise ConfigError(f"data.frame_sampling '{config.frame_sampling}': must be release or trim")
    for name, size in (("vae", vae_size), ("vit", vit_size)):
        try:
            size(1, 1, getattr(config, f"{name}_resolution"), getattr(config, f"{name}_sides"))
        except ValueError as error:
            raise ConfigError(f"data.{name}_sides or data.{name}_resolution: {error}") from error
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


def _mixture(sources: Sequence[_Source], fraction: float, held_out: bool) -> list[MixtureSource]:
    """The sources as the mixture sees them; an epoch of validation has every row that is held out once.

    Raises:
        DataSetError: if no source has a row.
    """
    empty = [source.name for source in sources if not source.rows]
    if len(empty) == len(sources):
        raise DataSetError(f"data.validation_fraction {fraction}: holds out no row of any source; raise it")
    if empty:
        logger.warning("no validation rows in %s", ", ".join(empty))
    return [MixtureSource(s.name, s.groups, s.rows if held_out else s.reader.source.weight) for s in sources]


class _Planner:
    """Samples of draws, and what is known of rows that cannot be used."""

    def __init__(self, config: DataConfig, model: ModelConfig, seed: int, sources: Sequence[_Source]) -> None:
        self._config, self._seed, self._sources = config, seed, sources
        self._sizing = Sizing.of(config, model)
        self._unusable: dict[RowKey, UnusableRow] = {}
        self._named: Counter[int] = Counter()  # unusable rows, by source

    def costs(self, draws: Iterator[Draw], waiting: dict[int, tuple[IndexRow, Sample]]) -> Iterator[SampleCost]:
        """What the packer must know of each draw; the sample itself waits until its pack is formed.

        Args:
            draws: in mixture order.
            waiting: where samples are put, by the number of their draw.
        """
        for number, draw in enumerate(draws):
            waiting[number] = self._plan(draw)
            _, sample = waiting[number]
            yield sample.length, mask_pairs(sample.segments), draw.source

    def unusable_lines(self) -> list[dict[str, object]]:
        """The unusable rows for unusable.jsonl, in the order of the data."""
        replaced: Counter[int] = Counter()
        for (source, _), row in self._unusable.items():
            replaced[source] += len(row.substitutes)
        for source, rows in sorted(self._named.items()):
            known = self._sources[source]
            counts = known.name, rows, known.rows, replaced[source]
            logger.warning("source %s: %d of %d rows are unusable; %d samples are substitutes from the others", *counts)
        return [
            {**vars(row.place), "cause": row.cause, "substitutes": row.substitutes}
            for _, row in sorted(self._unusable.items())
        ]

    def _plan(self, draw: Draw) -> tuple[IndexRow, Sample]:
        """The sample of a draw, or of what stands in for it."""
        key = draw.source, self._sources[draw.source].row(draw.row)
        planned = self._try(key, draw.epoch)
        return planned if planned else self._substitute(key, draw.epoch)

    def _try(self, key: RowKey, epoch: int, stands_for: str = "") -> tuple[IndexRow, Sample] | None:
        """The sample of a row; None if it cannot be used, which is said once."""
        if key in self._unusable:
            return None
        file, place = self._sources[key[0]].find(key[1])
        try:
            return self._plan_row(file, place, key[0], epoch, stands_for)
        except RecordError as error:
            self._unusable[key] = UnusableRow(place, str(error), [])
            self._name(key)
            return None

    def _name(self, key: RowKey) -> None:
        """Say which row cannot be used; of a source with very many the first ones."""
        self._named[key[0]] += 1
        if self._named[key[0]] <= _NAMED:
            logger.warning("unusable row: %s", self._unusable[key])
        elif self._named[key[0]] == _NAMED + 1:
            source = self._sources[key[0]].name
            logger.warning("source %s: further unusable rows stand in unusable.jsonl of the index", source)

    def _plan_row(
        self, file: FileFacts, place: Place, source: int, epoch: int, stands_for: str
    ) -> tuple[IndexRow, Sample]:
        """The sample of a row; a substitute gets an id, and randomness, of its own.

        Raises:
            RecordError: if the row cannot be used with nothing dropped, whatever this draw drops.
        """
        facts, config = file.row(place.row), self._config
        if isinstance(facts, str):
            raise RecordError(facts)
        settings = self._sources[source].reader.source
        task = Task(settings.task)
        row = IndexRow(facts, place, epoch, Dropout(), stands_for)
        of_row = (facts, place, row.sample_id, task, settings.frame_conditions, self._sizing)
        sample, _ = plan_sample(*of_row, Dropout())
        for name in ("seq_length", "max_sample_length"):
            limit = getattr(config, name)
            if limit is not None and sample.length > limit:
                raise RecordError(
                    f"{place.sample_id}: {sample.length} tokens exceed data.{name} {limit}; raise it, or lower "
                    "data.vae_resolution, data.vit_resolution or data.max_seconds_generation"
                )
        dropout = draw_dropout(config, len(facts.media) - 1, row.sample_id, task, self._seed, epoch)
        if dropout == Dropout():
            return row, sample
        return IndexRow(facts, place, epoch, dropout, stands_for), plan_sample(*of_row, dropout)[0]

    def _substitute(self, key: RowKey, epoch: int) -> tuple[IndexRow, Sample]:
        """A sample of another row in place of one of an unusable row.

        It is the first usable row of the source in an order addressed by the unusable row and the epoch, so it does not
        depend on which other rows are drawn.  Rows found unusable on the way are named too.

        Raises:
            DataSetError: if the source has no usable row.
        """
        source, replaced = self._sources[key[0]], self._unusable[key]
        order = stream(self._seed, "substitute", replaced.place.sample_id, epoch)
        for number in self._order(order, source.rows):
            planned = self._try((key[0], source.row(number)), epoch, replaced.place.sample_id)
            if planned:
                replaced.substitutes.append(planned[0].sample_id)
                return planned
        first = self._unusable[key[0], source.row(0)]
        raise DataSetError(
            f"data.sources {source.name}: none of its {source.rows} rows can be used; the first: {first}"
        )

    @staticmethod
    def _order(order: np.random.Generator, rows: int) -> Iterator[int]:
        """A few numbers below `rows`, then all: most sources have usable rows, and few of them are short."""
        yield from order.integers(rows, size=_TRIES).tolist()
        yield from order.permutation(rows).tolist()
