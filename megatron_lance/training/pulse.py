"""What ranks tell one another in each step: whether one was asked to stop, and how long each was busy.

Station: step -> [pulse] -> update, which brings it to all ranks -> stop, report of stragglers.  Every rank has the
pulses of all, so every rank decides alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lance.training.signals import StopReason


@dataclass(frozen=True)
class Pulse:
    """One rank in a step.

    Attributes:
        stop: what it was asked.
        replica: which model replica it belongs to.
        data_seconds: that it waited for data.
        busy_seconds: of forward and backward until its gradients wait for those of other replicas.
    """

    stop: StopReason = StopReason.NONE
    replica: int = 0
    data_seconds: float = 0.0
    busy_seconds: float = 0.0

    @property
    def values(self) -> list[float]:
        """As numbers."""
        return [float(self.stop), float(self.replica), self.data_seconds, self.busy_seconds]

    @classmethod
    def of(cls, values: Sequence[float]) -> Pulse:
        """From `values`."""
        stop, replica, data, busy = values
        return cls(StopReason(int(stop)), int(replica), data, busy)


@dataclass(frozen=True)
class Straggler:
    """A replica that others wait for.

    Attributes:
        replica: its number.
        ranks: that form it.
        factor: its seconds over the median of replicas.
        steps: over which it was measured.
        data_share: of its time, waiting for data.
    """

    replica: int
    ranks: tuple[int, ...]
    factor: float
    steps: int
    data_share: float

    def line(self) -> str:
        """As a sentence."""
        ranks = ", ".join(map(str, self.ranks))
        return (
            f"replica {self.replica} (ranks {ranks}) took {self.factor:.2f} times the median of replicas over "
            f"{self.steps} steps; {self.data_share:.0%} of that it waited for data"
        )


class StragglerWatch:
    """Adds up how long replicas were busy, and names those that are much slower than the median.

    Within a replica ranks wait for one another in every layer, so its slowest rank makes all of them slow.

    Args:
        factor: of the median from which a replica is named; 0: none ever is.
        interval: steps that are added up.
    """

    def __init__(self, factor: float, interval: int) -> None:
        self.factor, self.interval = factor, interval
        self._data: dict[int, list[float]] = {}
        self._busy: dict[int, list[float]] = {}

    def after(self, pulses: Sequence[Pulse]) -> list[Straggler]:
        """Take in a step.

        Args:
            pulses: of all ranks, by rank.

        Returns:
            stragglers, the slowest first; nothing before `interval` steps have passed.
        """
        ranks: dict[int, list[int]] = {}
        for rank, pulse in enumerate(pulses):
            ranks.setdefault(pulse.replica, []).append(rank)
        for replica, own in ranks.items():
            self._data.setdefault(replica, []).append(max(pulses[rank].data_seconds for rank in own))
            self._busy.setdefault(replica, []).append(max(pulses[rank].busy_seconds for rank in own))
        steps = len(self._busy[pulses[0].replica])
        if steps < self.interval:
            return []
        waited = {replica: sum(seconds) for replica, seconds in self._data.items()}
        total = {replica: waited[replica] + sum(seconds) for replica, seconds in self._busy.items()}
        self._data, self._busy = {}, {}
        median = statistics.median(total.values())
        found = [
            Straggler(replica, tuple(ranks[replica]), seconds / median, steps, waited[replica] / seconds)
            for replica, seconds in total.items()
            if self.factor and seconds > self.factor * median
        ]
        return sorted(found, key=lambda straggler: -straggler.factor)
