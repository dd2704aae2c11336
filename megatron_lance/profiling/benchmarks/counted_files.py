"""Counted files: the local disk as if it were an object store, every byte that is asked for counted.

Station: parquet files -> [counted files] -> row groups, in benchmarks and tests.  Files are fsspec's buffered ones:
their reads become ranges, and they read ahead unless they are told not to.
"""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

PROTOCOL = "counted"


class CountedFile(AbstractBufferedFile):
    """An open file; see fsspec for its arguments."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        self.fs.bytes_read += len(data)
        self.fs.reads += 1
        return data


class CountedFileSystem(AbstractFileSystem):
    """Reads files of this machine; paths are absolute.

    Attributes:
        bytes_read: by this process.
        reads: ranges asked for by this process.
    """

    protocol = PROTOCOL

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.bytes_read = self.reads = 0
        self._local = LocalFileSystem()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix(f"{PROTOCOL}://").strip("/")

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        """What a folder holds."""
        return self._local.ls(path, detail=detail, **options)

    def info(self, path: str, **options: Any) -> Any:
        """What is known of a file."""
        return self._local.info(path, **options)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> CountedFile:
        options = {name: value for name, value in options.items() if name in ("cache_type", "cache_options")}
        return CountedFile(self, path, mode, block_size or "default", **options)


fsspec.register_implementation(PROTOCOL, CountedFileSystem, clobber=True)
