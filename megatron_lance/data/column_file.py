"""Column file: a column of a row group as a file that is mapped instead of read.

Station: row-group cache <-> [column file].  In: values.  Out: the same values, where they lie in the file.  It is an
uncompressed Arrow IPC file and behind it a seal, a digest of all that says where values lie, by which a file is
found out that was cut short or has changed there; the values themselves are not looked at.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

VERSION = 1
"""Raised whenever the same values would be kept otherwise."""
SEAL_BYTES = 16
MAPPED_BYTES = 1 << 22
"""Shorter files are read: a mapping costs a file descriptor."""
SEALED_BYTES = 1 << 20
"""Shorter buffers are sealed too, so texts are, and media are not."""


class DamagedFileError(OSError):
    """A column file that is not as it was written."""


def file_bytes(values: pa.ChunkedArray) -> int:
    """The size of the file that `write` makes."""
    counter = pa.MockOutputStream()
    _write(values, counter)
    return int(counter.size()) + SEAL_BYTES


def write(values: pa.ChunkedArray, path: Path) -> None:
    """Write values over a file that has the size of `file_bytes` already; it is on disk then.

    Raises:
        OSError, pa.ArrowException: if that fails.
    """
    with path.open("r+b") as file:
        _write(values, file)
        file.flush()
        whole = _bytes_of(file.fileno())
        file.write(_seal(whole, _values(whole)))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> pa.ChunkedArray:
    """The values of a file, which counts as used now.  They stay valid when it is removed.

    Raises:
        FileNotFoundError: if there is none.
        DamagedFileError: if it is not as it was written.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        with suppress(OSError):  # another user's, or on a disk that became read-only
            os.utime(file.fileno())
        whole = _bytes_of(file.fileno())
    values = _values(whole)
    if whole[whole.size - SEAL_BYTES :].to_pybytes() != _seal(whole, values):
        raise DamagedFileError("its structure has changed")
    return values


def _write(values: pa.ChunkedArray, sink: Any) -> None:
    table = pa.table({"values": values}).unify_dictionaries()  # the format has one dictionary per column
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _bytes_of(descriptor: int) -> pa.Buffer:
    """All bytes of an open file."""
    size = os.fstat(descriptor).st_size
    if size <= SEAL_BYTES:
        raise DamagedFileError("it is empty")
    if size < MAPPED_BYTES:
        return pa.py_buffer(os.pread(descriptor, size, 0))
    return pa.py_buffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))


def _values(whole: pa.Buffer) -> pa.ChunkedArray:
    """The column in the bytes of a file; nothing is copied."""
    try:
        return pa.ipc.open_file(whole[: whole.size - SEAL_BYTES]).read_all().column(0)
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:  # Arrow raises all of them
        raise DamagedFileError(str(error)) from error


def _seal(whole: pa.Buffer, values: pa.ChunkedArray) -> bytes:
    """Digest of a file but for its seal and, where it is large, the largest buffer of each chunk."""
    bodies = []
    for chunk in values.chunks:
        largest = max((buffer for buffer in chunk.buffers() if buffer), key=lambda b: b.size, default=None)
        if largest is not None and largest.size >= SEALED_BYTES:
            bodies.append((largest.address - whole.address, largest.size))
    digest, at = hashlib.blake2b(digest_size=SEAL_BYTES), 0
    for start, size in sorted(bodies):
        digest.update(whole[at:start])
        at = start + size
    digest.update(whole[at : whole.size - SEAL_BYTES])
    return digest.digest()
