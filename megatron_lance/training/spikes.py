"""Loss spikes: when a run goes back to a checkpoint, and which packs it then leaves out.

Station: losses of steps -> [spike watch] -> run, which loads the checkpoint before the spike and goes on behind the
packs that led to it.  Losses are global, so every rank sees the same spike.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence


class LossSpike(Exception):
    """The loss stayed far above what it was.

    Attributes:
        first: the first step of the spike, from 1.
        last: the last step done.
        losses: of the steps of the spike.
        usual: median before it.
    """

    def __init__(self, first: int, last: int, losses: Sequence[float], usual: float) -> None:
        super().__init__(f"loss {losses[-1]:.4g} after step {last}, {usual:.4g} before step {first}")
        self.first, self.last, self.losses, self.usual = first, last, tuple(losses), usual


class SpikeWatch:
    """Compares losses with the median of those before.

    Args:
        factor: of the median above which a loss is too high; 0: none is.
        steps: in a row that make a spike.
        window: losses the median is of; as many must have been seen.
    """

    def __init__(self, factor: float, steps: int, window: int) -> None:
        self.factor, self.steps = factor, steps
        self._usual: deque[float] = deque(maxlen=window)
        self._high: list[float] = []

    def remember(self, losses: Iterable[float]) -> None:
        """Take in losses of steps before this process, or before a rewind: what is usual is known from them."""
        self._usual.extend(losses)

    def after(self, step: int, loss: float) -> None:
        """Take in a step whose loss is finite.

        Raises:
            LossSpike: if it is one too many.
        """
        is_full = len(self._usual) == self._usual.maxlen
        if not (self.factor and is_full and loss > self.factor * statistics.median(self._usual)):
            self._high.clear()
            self._usual.append(loss)
            return
        self._high.append(loss)
        if len(self._high) >= self.steps:
            raise LossSpike(step - len(self._high) + 1, step, self._high, statistics.median(self._usual))
