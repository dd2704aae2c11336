"""Facts: what planning must know of a row, found out once.

Station: record, media bytes -> [facts] -> sample plan.  In: a row of a source.  Out: what its media are, and how many
text tokens stand between its visual blocks, as columns of an Arrow table.  Resolution, frame rate, budgets, mixture and
dropout are not in it: they are applied when packs are planned (sample_plan.py), so that changing them reads no media
and no text again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from megatron_lance.config.schema import PromptConfig
from megatron_lance.data.media import MediaError, MediaInfo, probe
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.records import Media, Record, RecordError, RecordReader, UnreachableError
from megatron_lance.data.tasks import Block, Dropout, assemble, outline
from megatron_lance.packing.sample import Sample, Task
from megatron_lance.packing.segment import Segment

_INT = pa.int32()
_MEDIA = pa.struct(
    [
        *[("element", pa.string()), ("video", pa.bool_()), ("width", _INT), ("height", _INT), ("n_frames", _INT)],
        ("average_fps", pa.float64()),
    ]
)
FACTS_SCHEMA = pa.schema(
    [
        *[("media", pa.list_(_MEDIA)), ("gaps", pa.list_(_INT)), ("span_start", _INT), ("span_stop", _INT)],
        *[("bare", _INT), ("bare_start", _INT), ("bare_stop", _INT), ("empty", _INT)],
    ]
)
FILE_SCHEMA = FACTS_SCHEMA.append(pa.field("cause", pa.string())).append(pa.field("unreachable", pa.bool_()))
"""Columns of the facts of a data file, one row per row; `cause` says why a row cannot be used whatever the settings,
and `unreachable` that it is worth another look."""


_TEXT = ("span_start", "span_stop", "bare", "bare_start", "bare_stop", "empty")
"""Columns with a number of each row, as in `TextFacts`."""
_CELL = 3
"""Tokens of a block of one cell, which stands for a block whose grid is not known yet."""


class MediaFact(NamedTuple):
    """A picture or clip of a row: where it lies in it, and what it is."""

    element: str
    info: MediaInfo


@dataclass(frozen=True)
class TextFacts:
    """Text tokens of a row's prompt.

    The gaps are the runs of text before, between and behind the visual blocks when nothing is dropped.  A generation
    sample that keeps no condition has one text before its target, tokenised as one, so its length is kept apart.

    Attributes:
        gaps: tokens of each gap.
        span: [start, stop) of the caption in the gap before the target, or of the label in the last gap; empty: none.
        bare: tokens before the target where no condition is kept; 0 for understanding.
        bare_span: [start, stop) of the caption in it.
        empty: tokens before the target where neither condition nor caption is kept.
    """

    gaps: tuple[int, ...]
    span: tuple[int, int]
    bare: int = 0
    bare_span: tuple[int, int] = (0, 0)
    empty: int = 0


@dataclass(frozen=True)
class RowFacts:
    """All that planning must know of a row.

    Attributes:
        media: pictures and clips, inputs in order, then the target of a generation sample.
        text: its text tokens.
    """

    media: tuple[MediaFact, ...]
    text: TextFacts

    def values(self) -> dict[str, Any]:
        """A row of FACTS_SCHEMA."""
        text = self.text
        media = [
            {
                **{"element": m.element, "video": m.info.kind == "video", "width": m.info.width},
                **{"height": m.info.height, "n_frames": m.info.n_frames, "average_fps": m.info.average_fps},
            }
            for m in self.media
        ]
        return {
            **{"media": media, "gaps": text.gaps, "span_start": text.span[0], "span_stop": text.span[1]},
            **{"bare": text.bare, "bare_start": text.bare_span[0], "bare_stop": text.bare_span[1], "empty": text.empty},
        }

    @classmethod
    def of(cls, values: dict[str, Any]) -> RowFacts:
        """The inverse of `values`."""
        media = tuple(
            MediaFact(
                m["element"],
                MediaInfo("video" if m["video"] else "image", m["width"], m["height"], m["n_frames"], m["average_fps"]),
            )
            for m in values["media"]
        )
        text = TextFacts(
            tuple(values["gaps"]),
            (values["span_start"], values["span_stop"]),
            values["bare"],
            (values["bare_start"], values["bare_stop"]),
            values["empty"],
        )
        return cls(media, text)


def row_facts(reader: RecordReader, file: str, row: int, prompts: PromptConfig, tokenizer: Tokenizer) -> RowFacts:
    """The facts of a row.

    Args:
        reader: of its source.
        file: name of the file.
        row: number in it.
        prompts: system prompts.
        tokenizer: of the run.

    Raises:
        RecordError, MediaError: if the row cannot be used, whatever the settings.
        DataSetError: if the file cannot be read.
    """
    record = reader.record(file, row)
    text = text_facts(record, Task(reader.source.task), prompts, tokenizer)
    found = []
    for media in (element for element in (*record.inputs, record.target) if isinstance(element, Media)):
        info = probe(reader.media(file, row, media.element))
        if info.kind != media.kind:
            raise RecordError(
                f"{record.sample_id} {media.element}: holds {info.kind} where the row says {media.kind}; correct the "
                "row"
            )
        found.append(MediaFact(media.element, info))
    return RowFacts(tuple(found), text)


def text_facts(record: Record, task: Task, prompts: PromptConfig, tokenizer: Tokenizer) -> TextFacts:
    """The text tokens of a record.

    Raises:
        RecordError: if the record's parts are not those of the task.
    """
    whole, gaps = _tokenise(record, task, prompts, tokenizer, Dropout())
    if not task.is_generation:
        ((start, stop),) = whole.label_spans
        behind = whole.length - gaps[-1]
        return TextFacts(gaps, (start - behind, stop - behind))
    span = _in_gap(whole, whole.length - gaps[-1] - _CELL - gaps[-2])
    conditions = sum(isinstance(element, Media) for element in record.inputs)
    bare, bare_span = gaps[0], span
    if conditions:
        dropped = Dropout(conditions=tuple(range(conditions)))
        sample, (bare, _) = _tokenise(record, task, prompts, tokenizer, dropped)
        bare_span = _in_gap(sample, 0)
    kind = record.target.kind if isinstance(record.target, Media) else ""
    return TextFacts(gaps, span, bare, bare_span, _empty_gap(task, kind, prompts, tokenizer))


def _tokenise(
    record: Record, task: Task, prompts: PromptConfig, tokenizer: Tokenizer, dropout: Dropout
) -> tuple[Sample, tuple[int, ...]]:
    """The sample with blocks of one cell, and its gaps."""
    pieces = outline(record, task, prompts, dropout)
    blocks = [Segment.visual(piece.kind, (1, 1, 1)) for piece in pieces if isinstance(piece, Block)]
    sample, _ = assemble(record.sample_id, task, pieces, blocks, tokenizer)
    gaps = [0]
    for segment in sample.segments:
        if segment.is_visual:
            gaps.append(0)
        else:
            gaps[-1] += segment.length
    return sample, tuple(gaps)


def _in_gap(sample: Sample, start: int) -> tuple[int, int]:
    """The caption counted from the start of its gap."""
    span = sample.caption_span
    return (0, 0) if span is None else (span[0] - start, span[1] - start)


@lru_cache(maxsize=64)
def _empty_gap(task: Task, kind: str, prompts: PromptConfig, tokenizer: Tokenizer) -> int:
    """Text tokens before a target whose conditions and caption are dropped; the same for all rows."""
    condition = (Media(kind, "0"),) if task.is_edit or task.is_subject_driven else ()
    record = Record("", "", 0, "", (*condition, "-"), Media(kind, "1"))
    _, gaps = _tokenise(record, task, prompts, tokenizer, Dropout(True, tuple(range(len(condition)))))
    return gaps[0]


def facts_table(
    reader: RecordReader, file: str, rows: range, prompts: PromptConfig, tokenizer: Tokenizer
) -> pa.RecordBatch:
    """The facts of some rows of a file, by FILE_SCHEMA.

    Raises:
        DataSetError: if the file cannot be read.
    """
    nothing = RowFacts((), TextFacts((), (0, 0))).values()
    lines = []
    for row in rows:
        try:
            lines.append(
                row_facts(reader, file, row, prompts, tokenizer).values() | {"cause": "", "unreachable": False}
            )
        except (RecordError, MediaError) as error:
            lines.append(nothing | {"cause": str(error), "unreachable": isinstance(error, UnreachableError)})
    return pa.RecordBatch.from_pylist(lines, schema=FILE_SCHEMA)


class FileFacts:
    """The facts of a data file, memory-mapped: what is asked for is read, the rest stays on disk.

    Planning asks for every row, in no order, so a row is put together from the columns' own numbers, which takes a
    third of the time that Arrow takes to make dicts of it.
    """

    def __init__(self, path: Path) -> None:
        """Open the one record batch of a facts file.

        Raises:
            OSError, pa.ArrowException: if it is unreadable or has other columns.
        """
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if not table.schema.equals(FILE_SCHEMA):
            raise pa.ArrowInvalid(f"columns {', '.join(table.schema.names)}")
        batch = next(iter(table.combine_chunks().to_batches()), pa.RecordBatch.from_pylist([], FILE_SCHEMA))
        media, gaps = batch.column("media"), batch.column("gaps")
        self._batch, self._cause = batch, batch.column("cause")
        self._media_ends, self._gap_ends = media.offsets.to_numpy(), gaps.offsets.to_numpy()
        self._gaps = gaps.values.to_numpy()
        self._element, self._is_video = media.values.field("element"), media.values.field("video")
        self._info = [media.values.field(name).to_numpy() for name in ("width", "height", "n_frames", "average_fps")]
        self._text = [batch.column(name).to_numpy() for name in _TEXT]

    def __len__(self) -> int:
        """Rows."""
        return int(self._batch.num_rows)

    @property
    def all_reached(self) -> bool:
        """Whether no row is worth another look."""
        return self._batch.column("unreachable").true_count == 0

    def row(self, row: int) -> RowFacts | str:
        """The facts of a row, or why it cannot be used."""
        if cause := self._cause[row].as_py():
            return str(cause)
        media = tuple(map(self._medium, range(self._media_ends[row], self._media_ends[row + 1])))
        gaps = self._gaps[self._gap_ends[row] : self._gap_ends[row + 1]].tolist()
        start, stop, bare, bare_start, bare_stop, empty = (column.item(row) for column in self._text)
        return RowFacts(media, TextFacts(tuple(gaps), (start, stop), bare, (bare_start, bare_stop), empty))

    def _medium(self, at: int) -> MediaFact:
        """One of the file's media, counted over its rows."""
        size_and_rate = (column.item(at) for column in self._info)
        info = MediaInfo("video" if self._is_video[at].as_py() else "image", *size_and_rate)
        return MediaFact(self._element[at].as_py(), info)
