"""Being asked to stop: by a signal, or by the clock.

Station: SLURM, torchrun or an operator -> [stop request] -> loop, which finishes the step, saves and ends with
ExitCode.STOPPED.  Each rank notes what it was asked; `training/pulse.py` makes all ranks agree.
"""

from __future__ import annotations

import os
import signal
import time
from enum import IntEnum
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopReason(IntEnum):
    """Why a run ends before its last step; where ranks differ, the largest counts."""

    NONE = 0
    TIME = 1
    SIGUSR1 = 2
    SIGTERM = 3

    @property
    def text(self) -> str:
        """As an operator reads it."""
        return "training.stop_after_minutes" if self is StopReason.TIME else self.name


class StopRequest:
    """Catches SIGTERM and SIGUSR1 while it is entered, on the main thread, and watches the time.

    Processes forked meanwhile, such as the writer of a checkpoint, let these signals pass: a scheduler sends them to
    every process of a job, and the trainer needs its writers until it ends.

    Args:
        minutes: of this process after which it stops; 0: no limit.
    """

    def __init__(self, minutes: float) -> None:
        self.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
        self._seen = StopReason.NONE
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:
            self._seen = StopReason[signal.Signals(number).name]

    @property
    def reason(self) -> StopReason:
        """What this rank was asked by now."""
        if self._seen is StopReason.NONE and time.monotonic() >= self.deadline:
            return StopReason.TIME
        return self._seen
