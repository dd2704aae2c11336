"""How long a rank was busy with a step before it waits for the other replicas.

Station: forward and backward -> [clock] -> pulse.  On a GPU marks are events of the stream, so the host does not wait.
"""

from __future__ import annotations

import time

import torch


class StepClock:
    """Two marks of a step: its begin, and the moment when this replica's gradients are complete.

    Args:
        device: that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[float] = [0.0, 0.0]
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._on_gpu else []

    def begin(self) -> None:
        """Forward begins."""
        self._mark(0)

    def gradients_complete(self) -> None:
        """Backward of the last micro-batch is done; what follows waits for other replicas."""
        self._mark(1)

    def _mark(self, which: int) -> None:
        if self._on_gpu:
            self._events[which].record()
        else:
            self._marks[which] = time.perf_counter()

    @property
    def busy_seconds(self) -> float:
        """Between the two marks; to be asked once the host has waited for the step."""
        if self._on_gpu:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._marks[1] - self._marks[0]
