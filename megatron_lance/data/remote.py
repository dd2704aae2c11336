"""Reads from storage that may fail for a moment: again, each time after a longer wait.

Station: beneath records.  In: a read.  Out: what it gives, or the error of the last attempt.
"""

from __future__ import annotations

import errno
import importlib
import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem

logger = logging.getLogger(__name__)

ATTEMPTS = 5
"""Of one read."""
FIRST_WAIT = 0.5
"""Seconds before the second attempt; doubled for each one after it."""
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Waiting does not mend these."""
_OF_MOUNTS = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ENOTCONN, errno.ESHUTDOWN, errno.ESTALE, errno.ETIMEDOUT}
)
"""What a network file system that is mounted (NFS, Lustre) fails with for a moment; other errors of files last."""

T = TypeVar("T")


class PatientReads:
    """Repeats reads that fail with an OSError, and counts the repetitions.

    Attributes:
        retries: reads that were repeated so far.

    Args:
        wait: seconds before the second attempt; None: FIRST_WAIT.
    """

    def __init__(self, wait: float | None = None) -> None:
        self.retries = 0
        self._wait = FIRST_WAIT if wait is None else wait

    def __call__(self, name: str, read: Callable[[], T], mounted: bool = False) -> T:
        """The result of `read`.

        Args:
            name: of what is read, for the log.
            read: may be called ATTEMPTS times.
            mounted: it reads files of this machine, whose errors last but for a few.

        Raises:
            OSError: of the last attempt, or one that lasts (no such file, no rights).
        """
        for attempt in range(1, ATTEMPTS):
            try:
                return _as_os_error(read)
            except LASTING:
                raise
            except OSError as error:
                if mounted and error.errno not in _OF_MOUNTS:
                    raise
                wait = self._wait * 2 ** (attempt - 1)
                logger.warning("%s: %s; attempt %d of %d follows in %.1f s", name, error, attempt + 1, ATTEMPTS, wait)
                self.retries += 1
                time.sleep(wait)
        return _as_os_error(read)


def is_local(file_system: Any) -> bool:
    """Whether a file system of fsspec is this machine's own, mounted ones included."""
    return isinstance(file_system, LocalFileSystem)


def threads_may_share(file_system: Any) -> bool:
    """Whether several threads may read from a file system at a time.

    Archives and sessions with a server have one position, local copies of remote files one list.
    """
    if isinstance(file_system, CachingFileSystem):
        return False
    protocols = (file_system.protocol,) if isinstance(file_system.protocol, str) else file_system.protocol
    return is_local(file_system) or file_system.async_impl or "hf" in protocols


def _as_os_error(read: Callable[[], T]) -> T:
    """`read`, the errors of fsspec's HTTP client, which are no OSErrors, made such."""
    http: tuple[Any, ...] = (importlib.import_module("aiohttp").ClientError,) if find_spec("aiohttp") else ()
    try:
        return read()
    except http as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
