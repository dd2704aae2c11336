"""Reads ahead on a tiny run, names its workers, and is killed: `python -m tests.killed_reader FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.tiny import TinyRun
from tests.unit.test_background import AHEAD, Data

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    reader = Data(TinyRun(folder, folder / "tiny.yaml")).reader(AHEAD)
    for number in range(3):
        reader.step(number)
    sys.stdout.write(" ".join(map(str, reader.pids)))
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
