"""Row groups: columns of the parquet files of a source, cached.

Station: source files -> [row groups] -> record.  In: a file, a row and a column.  Out: its cell.  A row group is read
whole, one column at a time, and kept: by the process for a while, and on a disk of the node where there is a cache.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.cached import CachingFileSystem

from megatron_lance.data.lru import Lru
from megatron_lance.data.remote import PatientReads, is_local
from megatron_lance.data.row_group_cache import GroupColumn, RowGroupCache
from megatron_lance.data.source_files import DataSetError, SourceFile

_OPEN_FILES = 16
_TAIL_BYTES = 1 << 16
_READ = ("_open", "_columns", "_patiently")
"""What a copy begins without."""


class RowGroups:
    """Cells by (file, row, column).

    Reads of remote or mounted storage are repeated where they fail for a moment.  A copy made by pickling opens files
    of its own.

    Args:
        source: its name.
        file_system: of the files.
        files: of the source.
        kept_bytes: bound of the row groups that the process keeps; it keeps at least the last one, all its columns.
        cache: of the node; None: there is none.
    """

    def __init__(
        self,
        source: str,
        file_system: Any,
        files: Sequence[SourceFile],
        kept_bytes: int,
        cache: RowGroupCache | None = None,
    ) -> None:
        self._source, self._fs, self._kept_bytes, self._cache = source, file_system, kept_bytes, cache
        self._by_name = {file.name: file for file in files}
        self._reset()

    def _reset(self) -> None:
        """Begin with nothing open and nothing read."""
        self._patiently = PatientReads()
        self._open = Lru(_OPEN_FILES, dispose=lambda opened: opened[0].close(force=True))
        self._columns = Lru(self._kept_bytes, unit=lambda key: key[:2])  # rows are read column after column

    def __getstate__(self) -> dict[str, Any]:
        """All but what is open or kept."""
        return {name: value for name, value in vars(self).items() if name not in _READ}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin with nothing open and nothing read."""
        vars(self).update(state)
        self._reset()

    @property
    def retries(self) -> int:
        """Reads of remote storage that were repeated so far."""
        return self._patiently.retries

    def path(self, file: str) -> str:
        """Where a file lies.

        Raises:
            DataSetError: if the source has no such file.
        """
        if file not in self._by_name:
            raise DataSetError(
                f"data.sources {self._source}: has no file '{file}'; the source changed: run tools/prepack.py again"
            )
        return self._by_name[file].path

    def patiently(self, file_system: Any, name: str, read: Callable[[], Any]) -> Any:
        """A read of a file system, repeated where that fails for a moment."""
        return self._patiently(name, read, mounted=is_local(file_system))

    def parquet(self, file: str) -> pq.ParquetFile:
        """A file, opened; errors as of `starts`."""
        return self._open_file(file)[0]

    def starts(self, file: str) -> list[int]:
        """The first row of each row group of a file, and the number of rows.

        Raises:
            DataSetError: if the file cannot be read.
        """
        return self._open_file(file)[1]

    def footer(self, file: str) -> tuple[pq.FileMetaData, str]:
        """The metadata of a file and its hash: schema, row groups, sizes, statistics; nothing stays open.

        One read where it fits in the last 64 KiB.

        Raises:
            DataSetError: if the file cannot be read.
        """
        path, size = self.path(file), self._by_name[file].size

        def tail(length: int) -> bytes:
            start = max(size - length, 0)
            return bytes(self.patiently(self._fs, path, lambda: self._fs.cat_file(path, start=start, end=size)))

        try:
            end = tail(_TAIL_BYTES)  # it ends with the metadata, their length in four bytes, and PAR1
            length = int.from_bytes(end[-8:-4], "little")
            if end.endswith(b"PAR1") and len(end) < length + 8 <= size:
                end = tail(length + 8)
            return pq.read_metadata(pa.BufferReader(end)), hashlib.sha256(end[-8 - length : -8]).hexdigest()
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error

    def cell(self, file: str, row: int, column: str) -> Any:
        """The pyarrow scalar of a cell; the row is one of the file.

        Raises:
            DataSetError: if the file cannot be read.
        """
        starts = self.starts(file)
        group = bisect_right(starts, row) - 1

        def column_and_size() -> tuple[pa.ChunkedArray, int]:
            if self._cache is None:
                values = self._read_column(file, group, column)
            else:
                key = self._key(file, group, column)
                values = self._cache.get(key, lambda: self._read_column(file, group, column))
            return values, values.nbytes

        return self._columns.get((file, group, column), column_and_size)[row - starts[group]]

    def _read_column(self, file: str, group: int, column: str) -> pa.ChunkedArray:
        """A column of a row group, from storage."""
        path = self.path(file)

        def read() -> pa.ChunkedArray:
            try:
                return self.parquet(file).read_row_group(group, columns=[column]).column(0)
            except OSError:
                self._open.drop(file)  # a connection that failed is not used again
                raise

        try:
            return self.patiently(self._fs, path, read)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error

    def _key(self, file: str, group: int, column: str) -> GroupColumn:
        """The address of a column in the node's cache."""
        known, described = self._by_name[file], self.parquet(file).metadata.row_group(group)
        chunks = tuple(
            (chunk.data_page_offset, chunk.total_compressed_size, chunk.total_uncompressed_size)
            for chunk in map(described.column, range(described.num_columns))
            if f"{chunk.path_in_schema}.".startswith(f"{column}.")
        )
        path = self._fs.unstrip_protocol(known.path)
        return GroupColumn(path, known.size, known.stamp, group, column, chunks)

    def _open_file(self, file: str) -> tuple[pq.ParquetFile, list[int]]:
        """The opened file and the first row of each of its row groups, with the number of rows behind them."""
        path = self.path(file)

        def open_parquet() -> pq.ParquetFile:
            return pq.ParquetFile(self._stream(path), pre_buffer=False)  # it would keep the bytes it read last

        def open_file() -> tuple[tuple[pq.ParquetFile, list[int]], int]:
            try:
                parquet = self.patiently(self._fs, path, open_parquet)
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(path, error) from error
            groups = range(parquet.metadata.num_row_groups)
            return (parquet, [0, *accumulate(parquet.metadata.row_group(g).num_rows for g in groups)]), 1

        opened: tuple[pq.ParquetFile, list[int]] = self._open.get(file, open_file)
        return opened

    def _stream(self, path: str) -> Any:
        """A file whose reads ask for the bytes that are wanted: object stores would read ahead, tens of MB a time."""
        as_it_is = is_local(self._fs) or isinstance(self._fs, CachingFileSystem)  # the latter sets this itself
        return self._fs.open(path, "rb", **({} if as_it_is else {"cache_type": "none"}))


def _unreadable(path: str, error: Exception) -> DataSetError:
    return DataSetError(f"{path}: is not a readable parquet file ({error}); write it again or leave it out")
