"""Records: parquet rows of every schema, addressed by (file, row).

Station: row groups -> [record] -> task -> sample.  In: cells of the files of one source (spec/data.md section 1).  Out:
records of one shape for all schemas (system prompt, inputs in order, target) and the bytes of their media.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa

from megatron_lance.config.errors import DataError
from megatron_lance.config.schema import SourceConfig
from megatron_lance.data.remote import LASTING, threads_may_share
from megatron_lance.data.row_group_cache import RowGroupCache
from megatron_lance.data.row_groups import RowGroups
from megatron_lance.data.source_files import DataSetError, SourceFile, list_files
from megatron_lance.packing.sample import Task

__all__ = ["DataSetError", "Footer", "Media", "Record", "RecordError", "RecordReader", "SourceFile", "UnreachableError"]

INTERLEAVE = ("interleave_array", "element_dtype_array")


class RecordError(DataError):
    """A row that cannot become a sample; prepack reports it and goes on."""


class UnreachableError(RecordError):
    """A row whose media could not be read now; another time they may."""


@dataclass(frozen=True)
class Media:
    """A picture or clip of a record.

    Attributes:
        kind: "image" or "video".
        element: where it lies in the row: a column name, or an index of the interleave array as digits.
    """

    kind: str
    element: str


@dataclass(frozen=True)
class Record:
    """A row of any schema.

    Attributes:
        source: name of the source.
        file: name of the file below the source's folder.
        row: row number in the file.
        system: system prompt of the row; empty if it has none.
        inputs: texts and media before the target, in order.
        target: what is generated or answered.
    """

    source: str
    file: str
    row: int
    system: str
    inputs: tuple[str | Media, ...]
    target: str | Media

    @property
    def sample_id(self) -> str:
        """Stable name, unique over all sources."""
        return f"{self.source}/{self.file}/{self.row}"


@dataclass(frozen=True)
class Footer:
    """What a parquet file says of itself.

    Attributes:
        group_rows: rows of each row group.
        sha256: hash of its metadata: schema, row groups, sizes, statistics.
    """

    group_rows: tuple[int, ...]
    sha256: str

    @property
    def rows(self) -> int:
        """Of the file."""
        return sum(self.group_rows)


@dataclass(frozen=True)
class _Schema:
    """Columns of a flat schema; an input is a text column unless `media` names its kind."""

    system: str | None
    inputs: tuple[str, ...]
    target: str
    media: dict[str, str]

    @property
    def columns(self) -> tuple[str, ...]:
        return (*([self.system] if self.system else []), *self.inputs, self.target)


def _generation(kind: str) -> _Schema:
    target = f"{kind}_bytes"
    return _Schema(None, ("caption",), target, {target: kind})


def _editing(kind: str) -> _Schema:
    before, after = f"input_{kind}_bytes", f"output_{kind}_bytes"
    return _Schema(None, (before, "caption"), after, {before: kind, after: kind})


def _understanding(kind: str) -> _Schema:
    return _Schema("caption_i", (f"{kind}_bytes", "caption_q"), "caption_a", {f"{kind}_bytes": kind})


_FLAT_SCHEMAS = {
    Task.T2I: _generation("image"),
    Task.T2V: _generation("video"),
    Task.I2V: _generation("video"),
    Task.I_EDIT: _editing("image"),
    Task.V_EDIT: _editing("video"),
    Task.I2T: _understanding("image"),
    Task.V2T: _understanding("video"),
    Task.T2T: _Schema("caption_i", ("caption_q",), "caption_a", {}),
}


class RecordReader:
    """Rows of one source by (file, row); keeps a bounded number of row groups, one column each.

    A copy made by pickling opens files of its own.

    Attributes:
        files: sorted by name.
    """

    def __init__(self, source: SourceConfig, cache_bytes: int = 1 << 28, cache: RowGroupCache | None = None) -> None:
        """List the source's files; no file is opened.

        Args:
            source: path, task and form of the media.
            cache_bytes: bound of the row groups that this process keeps, bytes.
            cache: of the node; None: what is not kept is read from storage.

        Raises:
            DataSetError: if the task is unknown or no parquet file is found.
        """
        if source.task not in list(Task):
            raise DataSetError(
                f"data.sources {source.name}: task '{source.task}' is unknown; use one of {', '.join(Task)}"
            )
        self.source = source
        self._schema = _FLAT_SCHEMAS.get(Task(source.task))
        self._fs, self.files = list_files(source)
        self._groups = RowGroups(source.name, self._fs, self.files, cache_bytes, cache)
        self._interleaved: dict[str, bool] = {}

    @property
    def retries(self) -> int:
        """Reads of remote storage that were repeated so far."""
        return self._groups.retries

    @property
    def threads_may_share(self) -> bool:
        """Whether several threads may ask for footers at a time."""
        return threads_may_share(self._fs)

    def footer(self, file: str) -> Footer:
        """What a file says of itself; the file is not kept open.

        Raises:
            DataSetError: if the file cannot be read, or its columns are not those of the task.
        """
        metadata, sha256 = self._groups.footer(file)
        self._interleaved[file] = self._look_at_columns(file, metadata.schema.to_arrow_schema())
        groups = range(metadata.num_row_groups)
        return Footer(tuple(metadata.row_group(group).num_rows for group in groups), sha256)

    def record(self, file: str, row: int) -> Record:
        """Texts and media references of a row; flat schemas read no media column.

        Raises:
            DataSetError: if the file cannot be read or lacks columns.
            RecordError: if a text is not text, or the interleaved arrays contradict one another.
        """
        if self._is_interleaved(file):
            return self._interleaved_record(file, row)
        schema = self._schema
        assert schema is not None  # _is_interleaved checked the columns

        def element(column: str) -> str | Media:
            kind = schema.media.get(column)
            return Media(kind, column) if kind else self._text(file, row, column)

        system = self._text(file, row, schema.system) if schema.system else ""
        inputs = tuple(element(column) for column in schema.inputs)
        return Record(self.source.name, file, row, system, inputs, element(schema.target))

    def media(self, file: str, row: int, element: str) -> bytes:
        """The encoded bytes of a row's media element.

        Args:
            file: name of a file.
            row: row number in it.
            element: as in `Media`.

        Raises:
            RecordError: if there is nothing there, or a path or URL cannot be read.
            UnreachableError: if it cannot be read now.
        """
        where = f"{self.source.name}/{file} row {row} {element}"
        if element.isdigit():
            values = self._cell(file, row, INTERLEAVE[0]).values
            value = values[int(element)].as_py()
        else:
            value = self._cell(file, row, element).as_py()
        if not value:
            raise RecordError(f"{where}: is empty; remove the row or fill it")
        if self.source.raw_bytes_input:
            if not isinstance(value, bytes):
                raise RecordError(
                    f"{where}: holds {type(value).__name__}, not bytes; set raw_bytes_input: false for paths and URLs"
                )
            return value
        return self._read_reference(file, _as_reference(value, where), where)

    def _read_reference(self, file: str, reference: str, where: str) -> bytes:
        """Bytes behind a path or URL; a relative path starts at the parquet's folder.

        Raises:
            RecordError: if there is nothing to read.
            UnreachableError: if reading fails for another reason.
        """
        try:
            if "://" in reference:
                file_system, path = fsspec.core.url_to_fs(reference)
            else:
                file_system, path = self._fs, posixpath.join(posixpath.dirname(self._groups.path(file)), reference)
            return bytes(self._groups.patiently(file_system, reference, lambda: file_system.cat_file(path)))
        except (*LASTING, ValueError, ImportError) as error:  # as in list_files
            raise RecordError(f"{where}: '{reference}' cannot be read ({error}); check the path") from error
        except OSError as error:
            raise UnreachableError(f"{where}: '{reference}' cannot be read ({error}); check the storage") from error

    def _interleaved_record(self, file: str, row: int) -> Record:
        where = f"{self.source.name}/{file} row {row}"
        cell, kinds = self._cell(file, row, INTERLEAVE[0]).values, self._cell(file, row, INTERLEAVE[1]).as_py()
        if cell is None or kinds is None or len(cell) != len(kinds) or len(kinds) < 2:
            raise RecordError(
                f"{where}: {' and '.join(INTERLEAVE)} must have the same length of at least 2 "
                f"(found {cell and len(cell)} and {kinds and len(kinds)})"
            )
        elements: list[str | Media] = []
        for i, kind in enumerate(kinds):
            if kind == "text":
                elements.append(_as_text(cell[i].as_py(), f"{where} element {i}"))
            elif kind in ("image", "video"):
                elements.append(Media(kind, str(i)))
            else:
                raise RecordError(f"{where}: element {i} has type '{kind}'; allowed are text, image, video")
        return Record(self.source.name, file, row, "", tuple(elements[:-1]), elements[-1])

    def _is_interleaved(self, file: str) -> bool:
        """Whether the file has the interleave columns rather than the task's own; errors as of `_look_at_columns`."""
        if file not in self._interleaved:
            self._interleaved[file] = self._look_at_columns(file, self._groups.parquet(file).schema_arrow)
        return self._interleaved[file]

    def _look_at_columns(self, file: str, schema: pa.Schema) -> bool:
        """Whether the file has the interleave columns rather than the task's own.

        Raises:
            DataSetError: if it has neither, or interleave columns that are no lists.
        """
        names = set(schema.names)
        if self._schema is not None and names.issuperset(self._schema.columns):
            return False
        if names.issuperset(INTERLEAVE):
            kinds = [schema.field(name).type for name in INTERLEAVE]
            if not all(map(_is_list, kinds)):
                raise DataSetError(
                    f"{self._groups.path(file)}: {' and '.join(INTERLEAVE)} have types {kinds[0]} and {kinds[1]}; "
                    "both must be lists: write the file again"
                )
            return True
        expected = [self._schema.columns] if self._schema is not None else []
        raise DataSetError(
            f"{self._groups.path(file)}: lacks columns for task {self.source.task}: expected "
            f"{' or '.join(', '.join(c) for c in [*expected, INTERLEAVE])}; found {', '.join(sorted(names))}; "
            f"rename the columns or correct data.sources {self.source.name}.task"
        )

    def _text(self, file: str, row: int, column: str) -> str:
        return _as_text(self._cell(file, row, column).as_py(), f"{self.source.name}/{file} row {row} {column}")

    def _cell(self, file: str, row: int, column: str) -> Any:
        """The pyarrow scalar of a cell."""
        rows = self._groups.starts(file)[-1]
        if not 0 <= row < rows:
            raise RecordError(f"{self.source.name}/{file} row {row}: the file has {rows} rows")
        return self._groups.cell(file, row, column)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _as_reference(value: Any, where: str) -> str:
    """A path or URL, given as text or its bytes."""
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{where}: holds bytes that are no path or URL; set raw_bytes_input: true for media"
        ) from error


def _as_text(value: Any, where: str) -> str:
    """Text of a cell; empty for null.

    Raises:
        RecordError: if it is neither a string nor UTF-8 bytes.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(f"{where}: is not UTF-8 text ({error}); correct the row") from error
    if not isinstance(value, str):
        raise RecordError(f"{where}: holds {type(value).__name__}, not text; correct the row")
    return value
