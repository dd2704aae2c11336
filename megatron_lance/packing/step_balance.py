"""The packs of one step: samples into packs that are full and whose replicas finish together.

Station: samples of a step -> [step balance] -> packs of a step.  In: lengths and costs of the samples a step is to
hold, and of a reserve.  Out: packs, M consecutive ones per replica.  Long samples are placed where they even out cost,
pairs of packs are split again until no replica stands out, and what room is left is closed by trading a sample for a
slightly longer one of the reserve.  All sums are of whole numbers below 2**53, so every machine finds the same packs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_PARTS = 6
"""Parts of a pack; with those of another one all splits are tried."""
_PARTNERS = 6
"""Replicas of least cost that a costly one is tried against before the others."""
_STUCK = 2
"""Replicas too costly for any split that are passed over before balancing ends."""
_SLACK = 1 / 200
"""Share of a pack that may stay free for the sake of cost."""
_EMPTY = 1 / 20
"""Share of a pack that may stay free for the sake of the mixture."""
_TRADERS = 8
"""Packs of costly replicas that may trade to make room for a sample."""


@dataclass(frozen=True)
class Samples:
    """Samples by number: tokens, cost (any unit, whole numbers) and group (task or source), int64 [N] each."""

    length: IntArray
    cost: IntArray
    group: IntArray


@lru_cache(maxsize=_PARTS + 1)
def _selections(parts: int) -> IntArray:
    """Every way to take some of `parts`: int64 [2**parts, parts] of 0 and 1."""
    return (np.arange(1 << parts)[:, None] >> np.arange(parts)) & 1


class _Parts:
    """A pack in few parts, with tokens and cost of every selection of them; the short samples share parts."""

    def __init__(self, samples: Samples, pack: list[int]) -> None:
        parts = [[sample] for sample in pack]
        if len(pack) > _PARTS:
            ordered = sorted(pack, key=lambda i: (-samples.length[i], i))
            alone, short = ordered[: _PARTS // 2], ordered[_PARTS // 2 :]
            shared = _PARTS - len(alone)
            parts = [[sample] for sample in alone] + [short[k::shared] for k in range(shared)]
        self._parts = parts
        selections = _selections(len(parts))
        self.lengths = selections @ np.array([samples.length[part].sum() for part in parts], np.int64)
        self.costs = selections @ np.array([samples.cost[part].sum() for part in parts], np.int64)

    def best_split(self, other: _Parts, capacity: int, loads: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        """The split of two packs with the least cost of the costlier replica.

        Args:
            other: pack of another replica.
            capacity: tokens of a pack.
            loads: cost of the rest of each replica.

        Returns:
            (that cost, infinite if no split fits; the selections that make up the first pack).
        """
        length = self.lengths[:, None] + other.lengths[None, :]
        cost = self.costs[:, None] + other.costs[None, :]
        worst = np.maximum(cost + loads[0], int(cost[-1, -1]) + loads[1] - cost).astype(np.float64)
        worst[(length > capacity) | (length < length[-1, -1] - capacity)] = np.inf
        at = int(np.argmin(worst))
        return float(worst.flat[at]), divmod(at, len(other.lengths))

    def divide(self, other: _Parts, selected: tuple[int, int]) -> tuple[list[int], list[int]]:
        """The two packs of a split."""
        packs: tuple[list[int], list[int]] = ([], [])
        for parts, selection in ((self._parts, selected[0]), (other._parts, selected[1])):
            for k, part in enumerate(parts):
                packs[0 if selection >> k & 1 else 1].extend(part)
        return packs


class StepPacks:
    """Packs of a step while they are made.

    Attributes:
        packs: sample numbers of each pack.
        left: samples that found no room.
    """

    def __init__(self, samples: Samples, chosen: IntArray, packs: int, micro_batches: int, capacity: int) -> None:
        """Place samples, long ones first: a costly one with the replica of least cost so far, a cheap one with most.

        Args:
            samples: all there are.
            chosen: numbers of those the step is to hold.
            packs: how many to make.
            micro_batches: packs of a replica; divides `packs`.
            capacity: tokens of a pack.
        """
        self.samples, self.capacity, self.micro_batches = samples, capacity, micro_batches
        self.packs: list[list[int]] = [[] for _ in range(packs)]
        self.left: list[int] = []
        length, cost = samples.length[chosen], samples.cost[chosen]
        excess = cost - length * (int(cost.sum()) / max(int(length.sum()), 1))
        room = np.full(packs, capacity, np.int64)
        load = np.zeros(packs)  # of the replica, at each of its packs
        for i in np.lexsort((chosen, -length)):
            fits = np.flatnonzero(room >= length[i])
            if not len(fits):
                self.left.append(int(chosen[i]))
                continue
            sign = 1 if excess[i] > 0 else -1
            at = int(fits[np.lexsort((-room[fits], sign * load[fits]))[0]])
            self.packs[at].append(int(chosen[i]))
            room[at] -= length[i]
            first = at // micro_batches * micro_batches
            load[first : first + micro_batches] += excess[i]

    def sums(self, values: IntArray) -> IntArray:
        """Of a value of the samples, by pack: int64 [packs]."""
        return np.array([values[pack].sum() for pack in self.packs], np.int64)

    def loads(self, costs: IntArray) -> IntArray:
        """Cost of each replica."""
        return costs.reshape(-1, self.micro_batches).sum(1)

    def balance(self, tolerance: float) -> None:
        """Split pairs of packs again until the costliest replica is within `tolerance` x mean, or nothing helps."""
        costs = self.sums(self.samples.cost)
        limit = self.loads(costs).mean() * tolerance
        stuck: set[int] = set()
        known: dict[int, _Parts] = {}
        for _ in range(8 * len(self.packs)):
            loads = self.loads(costs)
            high = next((int(r) for r in np.argsort(-loads, kind="stable") if r not in stuck), None)
            if high is None or loads[high] <= limit or len(stuck) > _STUCK:
                return
            partners = [int(r) for r in np.argsort(loads, kind="stable") if loads[r] < loads[high]]
            changed = self._relieve(costs, loads, high, partners, limit, known)
            stuck = stuck - {high, changed} if changed is not None else stuck | {high}

    def _relieve(
        self, costs: IntArray, loads: IntArray, high: int, partners: list[int], limit: float, known: dict[int, _Parts]
    ) -> int | None:
        """Make the best split of a pack of a costly replica with one of a cheaper; returns the other replica."""
        best, found = float(loads[high]) * (1 - 1e-4), None
        for low in partners:
            for a in range(high * self.micro_batches, (high + 1) * self.micro_batches):
                for b in range(low * self.micro_batches, (low + 1) * self.micro_batches):
                    others = int(loads[high] - costs[a]), int(loads[low] - costs[b])
                    for pack in (a, b):
                        if pack not in known:
                            known[pack] = _Parts(self.samples, self.packs[pack])
                    worst, division = known[a].best_split(known[b], self.capacity, others)
                    if worst < best:
                        best, found = worst, (a, b, division)
            if found and (best <= limit or low == partners[:_PARTNERS][-1]):
                break
        if found is None:
            return None
        a, b, division = found
        self.packs[a], self.packs[b] = known.pop(a).divide(known.pop(b), division)
        for pack in (a, b):
            costs[pack] = self.samples.cost[self.packs[pack]].sum()
        return b // self.micro_batches

    def fill(self, reserve: list[int], tolerance: float) -> list[int]:
        """Close the room of every pack from a reserve; returns what is left of it, and of the step's own samples.

        The step's own samples without a pack go first, into costly packs; whatever is then free is closed by trades of
        a sample for a longer one of its group.  So the step keeps its tokens of every group.  No trade makes a replica
        cost more than `tolerance` x mean, unless much room would stay.

        Args:
            reserve: sample numbers.
            tolerance: of a replica's cost.
        """
        state = _Filling(self, reserve, tolerance)
        waiting = sorted(self.left, key=lambda i: (-self.samples.length[i], i))
        self.left = []
        for sample in waiting:
            if not state.place(sample):
                state.pool.append(sample)
        for at in np.argsort(-state.room, kind="stable").tolist():
            while state.trade(at):
                pass
        state.limit = np.inf
        for at in np.flatnonzero(state.room > _SLACK * self.capacity).tolist():
            while state.trade(at):
                pass
        for at in np.flatnonzero(state.room > _EMPTY * self.capacity).tolist():
            while state.add(at):
                pass
        return state.pool


class _Filling:
    """What `StepPacks.fill` knows: the pool to trade with; cost and free tokens of each pack."""

    def __init__(self, step: StepPacks, reserve: list[int], tolerance: float) -> None:
        self.step, self.samples, self.pool = step, step.samples, list(reserve)
        self.costs = step.sums(self.samples.cost)
        self.room = step.capacity - step.sums(self.samples.length)
        self.limit = step.loads(self.costs).mean() * tolerance

    def place(self, sample: int) -> bool:
        """Put a sample into a pack of a costly replica that has room or can trade for it; False if there is none."""
        length = int(self.samples.length[sample])
        loads = self.step.loads(self.costs).repeat(self.step.micro_batches)
        packs = np.lexsort((-self.room, -loads)).tolist()
        for at in [at for at in packs if self.room[at] >= length][:1] or packs[:_TRADERS]:
            if self.room[at] >= length or self.trade(at, length):
                self.step.packs[at].append(sample)
                self.room[at] -= length
                self.costs[at] += self.samples.cost[sample]
                return True
        return False

    def add(self, at: int) -> bool:
        """Put the longest sample of the pool that fits into a pack; False if there is none."""
        lengths = self.samples.length[np.array(self.pool, np.int64)]
        fits = np.flatnonzero(lengths <= self.room[at])
        if not len(fits):
            return False
        sample = self.pool.pop(int(fits[np.argmax(lengths[fits])]))
        self.step.packs[at].append(sample)
        self.room[at] -= self.samples.length[sample]
        self.costs[at] += self.samples.cost[sample]
        return True

    def trade(self, at: int, keep: int = 0) -> bool:
        """Trade a sample of a pack for the one of its group that leaves the least room, but `keep`.

        Args:
            at: the pack.
            keep: tokens that must be free behind the trade; with 0 the sample must be longer.

        Returns:
            Whether there was one.
        """
        pack, spare, samples = np.array(self.step.packs[at]), np.array(self.pool, np.int64), self.samples
        if not len(spare) or not len(pack) or self.room[at] <= 0:
            return False
        gain = samples.length[spare][None, :] - samples.length[pack][:, None]
        extra = samples.cost[spare][None, :] - samples.cost[pack][:, None]
        load = self.step.loads(self.costs)[at // self.step.micro_batches]
        allowed = samples.group[spare][None, :] == samples.group[pack][:, None]
        allowed &= (gain <= self.room[at] - keep) & ((load + extra <= self.limit) | (extra <= 0))
        if not keep:
            allowed &= gain > 0
        best = int(np.argmax(np.where(allowed, gain, -self.step.capacity)))
        mine, other = divmod(best, len(spare))
        if not allowed[mine, other]:
            return False
        self.step.packs[at][mine], self.pool[other] = int(spare[other]), int(pack[mine])
        self.room[at] -= gain[mine, other]
        self.costs[at] += extra[mine, other]
        return True
