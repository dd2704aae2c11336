"""Ownership: one run at a time writes to a run folder.

Station: start of a run -> [ownership] -> all that is written.  A job that is started again while a process of the one
before lingers would write the same metrics and checkpoints.  The first rank holds a lock on a file of the folder, which
ends with its process however that ends, on this machine and, where the file system's locks reach, on others.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep

from megatron_lance.checkpoint.everywhere import first_ranks
from megatron_lance.config.loader import ConfigError

logger = logging.getLogger(__name__)

FILE = "owner"
"""Name of the file; it says who holds the lock, and stays."""
PATIENCE_SECONDS = 60.0
"""That a run waits for the one before it to end."""
LOOK_SECONDS = 0.5
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """A context in which no other run writes to the folder; a collective of the world to enter.

    Raises:
        ConfigError: on all ranks, if another run does not end within PATIENCE_SECONDS, or the file cannot be written.
    """
    held: list[int] = []

    def take() -> None:
        held.append(_opened(run_dir))
        _take(held[0], run_dir)

    try:
        first_ranks(take)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _opened(run_dir: Path) -> int:
    """A descriptor of the file.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        return os.open(run_dir / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(
            f"training.run_dir '{run_dir}': '{FILE}' in it cannot be written ({error.strerror}); correct its rights or "
            "give another folder"
        ) from error


def _take(descriptor: int, run_dir: Path) -> None:
    """Take the lock, and write down who has it.

    Raises:
        ConfigError: if another process has it for too long.
    """
    end, told = monotonic() + PATIENCE_SECONDS, False
    while not _is_free(descriptor, run_dir):
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
        if monotonic() > end:
            raise ConfigError(
                f"training.run_dir '{run_dir}': another run trains in it ({holder}); end that one, or give this one "
                "another folder"
            )
        if not told:
            logger.warning("training.run_dir '%s': waiting for the run that trains in it (%s) to end", run_dir, holder)
        told = True
        sleep(LOOK_SECONDS)
    os.truncate(descriptor, 0)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)


def _is_free(descriptor: int, run_dir: Path) -> bool:
    """Whether the lock is this process's now; a record lock, which a forked writer of checkpoints does not keep."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("training.run_dir '%s': its file system has no locks; see that no other run uses it", run_dir)
    return True
