"""One run at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_lance.config.loader import ConfigError
from megatron_lance.training import ownership
from megatron_lance.training.ownership import FILE, owned
from tests.command import Commander
from tests.tiny import TinyRun
from tests.unit.tiny_model import one_rank

HOLD = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
os.write(file, b"process 7 on node3 since noon")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process trains in a folder, until it is told to end."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOLD, str(folder / FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        yield other
        other.kill()


def test_a_second_run_in_a_folder_is_refused_and_writes_nothing(
    tiny_run: TinyRun, tmp_path: Path, command: Commander, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 0.0)
    folder = tmp_path / "run"
    with held(folder):
        outcome = command(f"train --config {tiny_run.config} training.run_dir={folder} training.train_iters=1")
        assert outcome.code == 2
        assert outcome.err.splitlines()[-1] == (
            f"train: rank 0: error: training.run_dir '{folder}': another run trains in it (process 7 on node3 since "
            "noon); end that one, or give this one another folder"
        )
        assert [path.name for path in folder.iterdir()] == [FILE]


def test_a_run_that_ends_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with one_rank(), held(tmp_path) as other:
        monkeypatch.setattr(ownership, "sleep", lambda seconds: other.kill())
        with owned(tmp_path):
            assert (tmp_path / FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert "waiting for the run that trains in it (process 7 on node3 since noon) to end" in caplog.text


def test_a_lock_ends_with_its_run_though_a_forked_writer_lives(tmp_path: Path) -> None:
    with one_rank():
        with owned(tmp_path):
            read, write = os.pipe()
            if not (writer := os.fork()):
                os.close(write)
                os.read(read, 1)
                os._exit(0)
        with held(tmp_path):  # nothing keeps it from its lock
            os.close(write)
        os.waitpid(writer, 0)


def test_a_file_system_without_locks_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*unused: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with one_rank(), owned(tmp_path):
        assert "its file system has no locks" in caplog.text


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with one_rank(), pytest.raises(ConfigError, match="'owner' in it cannot be written"), owned(tmp_path):
        pass
