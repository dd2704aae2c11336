"""Row-group cache: columns of row groups on a disk of the node, read from storage once for all its processes.

Station: parquet files -> [row-group cache] -> row groups.  In: which column of which row group, and how to read it.
Out: its values, mapped from a file of the cache.  One process of the node reads a column that is missing, the others
wait and map what it wrote.  A file appears whole or not at all; what was used least recently is removed.  What fails in
the folder is said once and costs reads of storage, never the run.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

import pyarrow as pa

from megatron_lance.config.errors import UserError
from megatron_lance.data import column_file
from megatron_lance.data.column_file import DamagedFileError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.02
"""Between looks for what another process reads."""
PATIENCE_SECONDS = 60.0
"""That a process waits for another one's read before it reads too."""
PAUSE_SECONDS = 60.0
"""That nothing is written after something failed."""
SPARED = 0.1
"""Of its disk, at most as much as its bound, that is left to others: in /dev/shm the pixels of steps ahead lie too."""
_CLOCK_NS = 60 * 10**9
"""A file used later than that from now, before the clock was set back, counts as long unused."""
_FILE = re.compile(r"[0-9a-f]{32}\.row_group(\.partial)?")

T = TypeVar("T")


@dataclass(frozen=True)
class GroupColumn:
    """A column of a row group, by what decides its content.

    Attributes:
        path: of the data file, with its protocol.
        size: of the data file, bytes.
        stamp: of its version, see `SourceFile`.
        group: number of the row group.
        column: name.
        chunks: (offset, bytes as stored, bytes as read) of each of the column's chunks in the data file.
    """

    path: str
    size: int
    stamp: str
    group: int
    column: str
    chunks: tuple[tuple[int, int, int], ...]

    @property
    def digest(self) -> str:
        """Name of its file, 32 hex digits."""
        content = repr((column_file.VERSION, astuple(self)))
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of its values, about."""
        return sum(chunk[-1] for chunk in self.chunks)

    def __str__(self) -> str:
        return f"{self.path} row group {self.group} column {self.column}"


class RowGroupCache:
    """Columns of row groups in a folder; a copy made by pickling shares the files and nothing else.

    Args:
        folder: on a disk of this node; other files in it are left alone.
        bound: of all files of the cache, bytes.
    """

    def __init__(self, folder: str | Path, bound: int) -> None:
        self._folder, self._bound = Path(folder), bound
        self._said: set[str] = set()
        self._paused_until = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroupCache, (self._folder, self._bound)

    @classmethod
    def open(cls, folder: str, gigabytes: float) -> RowGroupCache:
        """The cache of a run.

        Args:
            folder: data.row_group_cache.
            gigabytes: data.row_group_cache_gb.

        Raises:
            UserError: if the folder cannot be made or written, or does not lie on a disk of this node.
        """
        remedy = "name a folder on a disk of this node, or set data.row_group_cache=''"
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(prefix=".probe-", dir=folder) as probe:
                locks = _locks(Path(probe.name))
        except OSError as error:
            cause = f"cannot be written ({error.strerror})"
            raise UserError(f"data.row_group_cache '{folder}': {cause}; {remedy}") from error
        if not locks:
            raise UserError(f"data.row_group_cache '{folder}': has the locks of a network file system; {remedy}")
        return cls(folder, round(1e9 * gigabytes))

    def get(self, key: GroupColumn, read: Callable[[], pa.ChunkedArray]) -> pa.ChunkedArray:
        """The values of a column, out of the cache or read.

        Args:
            key: which column.
            read: gives its values from storage; its errors are passed on.
        """
        if key.nbytes > self._bound:
            self._say_large(key)
            return read()
        path = self._folder / f"{key.digest}.row_group"
        partial = path.with_name(f"{path.name}.partial")
        give_up = time.monotonic() + PATIENCE_SECONDS
        while (found := self._guarded(lambda: _find(path))) is None and time.monotonic() >= self._paused_until:
            claim = self._guarded(lambda: self._begin(partial))
            if claim is not None:
                return self._fill(key, path, partial, claim, read)
            if time.monotonic() > give_up:
                self._say("wait", f"another process is reading {key} for {PATIENCE_SECONDS:g} s; it is read twice")
                break
            time.sleep(LOOK_SECONDS)
        return read() if found is None else found

    def _begin(self, partial: Path) -> int | None:
        """As `_claim`; the folder is made again where it was removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return _claim(partial)

    def _fill(
        self, key: GroupColumn, path: Path, partial: Path, claim: int, read: Callable[[], pa.ChunkedArray]
    ) -> pa.ChunkedArray:
        """The values, read by this process alone, and kept if they can be."""
        kept = False
        try:
            found = self._guarded(lambda: _find(path, say_damage=True))
            if found is not None:  # written since this process looked
                return found
            values = read()
            kept = self._guarded(lambda: self._keep(key, values, partial, path)) or False
            found = self._guarded(lambda: _find(path)) if kept else None
            return values if found is None else found
        finally:
            if not kept:
                with suppress(OSError):
                    partial.unlink()
            os.close(claim)

    def _keep(self, key: GroupColumn, values: pa.ChunkedArray, partial: Path, path: Path) -> bool:
        """Write a file of the cache; whether there was room for it.

        The file has its whole size before room is made, so that processes that write at the same time see one another.
        """
        size = column_file.file_bytes(values)
        if size <= self._bound:
            os.truncate(partial, size)
        if size > self._bound or not self._make_room(size):
            self._say_large(key)
            return False
        column_file.write(values, partial)
        partial.rename(path)
        return True

    def _make_room(self, size: int) -> bool:
        """Remove files, the least recently used first, until one of `size` bytes fits that is there in name only.

        Files that processes have mapped stay valid for them.

        Raises:
            OSError: if the disk has no room whatever is removed.
        """
        kept, total = self._files()
        disk = shutil.disk_usage(self._folder)
        spared = min(round(SPARED * disk.total), self._bound)
        excess, lacking = total - self._bound, size + spared - disk.free
        if lacking > max(excess, 0):
            self._say(
                "disk",
                f"its disk is full before data.row_group_cache_gb {self._bound / 1e9:g} is reached "
                f"({spared / 1e9:.3g} GB are left to others); lower it, or make room",
            )
        for _, freed, path in sorted(kept):
            if excess <= 0 and lacking <= 0:
                break
            Path(path).unlink(missing_ok=True)
            excess, lacking = excess - freed, lacking - freed
        if lacking > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))
        return excess <= 0

    def _files(self) -> tuple[list[tuple[int, int, str]], int]:
        """(time of use, size, path) of the files, and their bytes with those being written; dead partial ones leave."""
        kept, total, latest = [], 0, time.time_ns() + _CLOCK_NS
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name = _FILE.fullmatch(entry.name)
                if name is None or (name[1] and _remove_if_dead(Path(entry.path))):
                    continue
                with suppress(FileNotFoundError):  # removed meanwhile
                    found = entry.stat()
                    total += found.st_size
                    if not name[1]:
                        used = found.st_mtime_ns
                        kept.append((used if used <= latest else 0, found.st_size, entry.path))
        return kept, total

    def _say_large(self, key: GroupColumn) -> None:
        gigabytes, bound = key.nbytes / 1e9, self._bound / 1e9
        self._say("large", f"data.row_group_cache_gb {bound:g} has no room for {key} of {gigabytes:.3g} GB; raise it")

    def _guarded(self, step: Callable[[], T]) -> T | None:
        """What a step in the folder gives; None, said once, if it fails, and then nothing is written for a while."""
        try:
            return step()
        except (OSError, pa.ArrowException) as error:
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            self._say("failed", f"{error}; while that lasts, row groups are read from storage by each process")
            return None

    def _say(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("data.row_group_cache '%s': %s", self._folder, message)


def _find(path: Path, say_damage: bool = False) -> pa.ChunkedArray | None:
    """The values in a file; None if there is no good one."""
    try:
        return column_file.read(path)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        if say_damage:
            logger.warning("%s: is damaged (%s) and made again", path, error)
        return None


def _claim(partial: Path) -> int | None:
    """A descriptor of the partial file, which this process alone may write; None if another process does.

    The lock on the descriptor ends with the process, however that ends.
    """
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(descriptor), os.stat(partial))  # not renamed or removed since it was opened
    except (BlockingIOError, FileNotFoundError):
        mine = False
    except OSError:
        os.close(descriptor)
        raise
    if mine:
        return descriptor
    os.close(descriptor)
    return None


def _locks(path: Path) -> bool:
    """Whether a lock keeps this process too from locking a file again; NFS would give it and lose the first."""
    with path.open("r+b") as first, path.open("r+b") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove_if_dead(partial: Path) -> bool:
    """Remove a partial file whose writer is gone; whether it was."""
    claim = _claim(partial)
    if claim is None:
        return False
    partial.unlink(missing_ok=True)
    os.close(claim)
    return True
