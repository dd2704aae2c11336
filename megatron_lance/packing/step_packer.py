"""Step packer: which samples form which pack of which step.

Station: sample lengths and costs in mixture order -> [step packer] -> pack index.  In: an endless or finite stream.
Out: the packs of one step after another.  A window of several steps is dealt at a time: the samples of every group
(task or source) go to its steps by length, so each step gets the same share of tokens of every group; the samples of a
step become packs (step_balance.py); the latest of the window are a reserve that fills what room is left and opens the
next window.  What is in memory is one window, and the result depends on the stream alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_lance.packing.packer import pack_lengths
from megatron_lance.packing.rng import stream
from megatron_lance.packing.step_balance import IntArray, Samples, StepPacks

SampleCost = tuple[int, int, int]
"""(tokens, mask pairs, group) of a sample."""
StepOfPacks = list[tuple[int, ...]]
"""Sample numbers of each pack of a step, ascending inside a pack."""

_ROUGH, _FILL, _FINE = 1.02, 1.05, 1.01
"""Cost of a replica over the mean that packs are balanced to at first, may have when filled, and are balanced to."""
_RESERVE = 8
"""One of so many steps of a window is a reserve."""


@dataclass(frozen=True)
class StepShape:
    """What the packs of a step are to be like.

    Attributes:
        capacity: tokens of a pack.
        packs: packs of a step, the global batch.
        replicas: data-parallel size they are balanced for; divides `packs`.  Another one can train on them too.
        token_cost: linear work of a token, in mask pairs.
        window: packs that are dealt to steps at a time.
        bands: 1: all steps of a window are alike.  k: a step takes its samples from one of k bands of length, so its
            packs are more alike, and steps less.

    Raises:
        ValueError: if a number is not positive or packs cannot be dealt evenly.
    """

    capacity: int
    packs: int
    replicas: int
    token_cost: float
    window: int = 384
    bands: int = 1

    def __post_init__(self) -> None:
        if min(self.capacity, self.packs, self.replicas, self.window, self.bands) < 1 or self.token_cost < 0:
            raise ValueError(f"{self}: every number must be positive")
        if self.packs % self.replicas:
            raise ValueError(f"{self.packs} packs to {self.replicas} replicas: each must get the same number")

    @property
    def micro_batches(self) -> int:
        """Packs of a replica."""
        return self.packs // self.replicas

    @property
    def window_steps(self) -> int:
        """Steps of a window."""
        return max(1, self.window // self.packs, self.bands)

    @property
    def reserve_steps(self) -> int:
        """Steps' worth of samples behind a window."""
        return -(-self.window_steps // _RESERVE)


def pack_steps(samples: Iterable[SampleCost], shape: StepShape, seed: int) -> Iterator[StepOfPacks]:
    """Packs of step after step; every sample once.

    Args:
        samples: in mixture order; a sample's number is its place.
        shape: of the packs.
        seed: of the order of the steps in a window.

    Yields:
        `shape.packs` packs per step.  At the end of the stream what fills no whole step is yielded as one last step
        that may have fewer or more packs, as full as can be.

    Raises:
        ValueError: if a sample is longer than a pack.
    """
    window = _Window(shape, seed)
    for number, (length, pairs, group) in enumerate(samples):
        if not 1 <= length <= shape.capacity:
            raise ValueError(
                f"sample {number} of {length} tokens: must lie in [1, capacity {shape.capacity}]; leave it out or "
                "raise data.seq_length"
            )
        window.append(number, length, pairs + round(shape.token_cost * length), group)
        if window.tokens >= (shape.window_steps + shape.reserve_steps) * shape.packs * shape.capacity:
            yield from window.steps(shape.window_steps)
    while (steps := window.tokens // (shape.packs * shape.capacity)) > shape.reserve_steps:
        yield from window.steps(min(shape.window_steps, steps - shape.reserve_steps))
    if steps:
        yield from window.steps(steps)
    yield from window.rest()


class _Window:
    """Samples that are in no pack yet, the oldest first."""

    def __init__(self, shape: StepShape, seed: int) -> None:
        self._shape, self._seed = shape, seed
        self._numbers: list[int] = []
        self._values: list[tuple[int, int, int]] = []  # length, cost, group
        self._windows = 0
        self.tokens = 0

    def append(self, number: int, length: int, cost: int, group: int) -> None:
        self._numbers.append(number)
        self._values.append((length, cost, group))
        self.tokens += length

    def steps(self, count: int) -> Iterator[StepOfPacks]:
        """Take the oldest samples away as the packs of `count` steps."""
        shape = self._shape
        samples = Samples(*np.array(self._values, np.int64).T)
        ahead = np.cumsum(samples.length) - samples.length
        main = int(np.searchsorted(ahead, count * shape.packs * shape.capacity))
        parts = _deal(samples, np.arange(main), count, shape.bands)
        left = list(range(main, len(self._numbers)))
        order = stream(self._seed, "steps of a window", self._windows).permutation(count)
        for part in map(int, order):
            step = StepPacks(samples, parts[part], shape.packs, shape.micro_batches, shape.capacity)
            step.balance(_ROUGH)
            left = step.fill(left, _FILL)
            step.balance(_FINE)
            yield [tuple(sorted(self._numbers[i] for i in pack)) for pack in step.packs if pack]
        left.sort()
        self._numbers, self._values = [self._numbers[i] for i in left], [self._values[i] for i in left]
        self.tokens = sum(value[0] for value in self._values)
        self._windows += 1

    def rest(self) -> Iterator[StepOfPacks]:
        """Everything, longest first into the fullest pack with room, as one step."""
        if self._numbers:
            order = sorted(range(len(self._numbers)), key=lambda i: (-self._values[i][0], i))
            lengths = [self._values[i][0] for i in order]
            groups = pack_lengths(lengths, self._shape.capacity, open_packs=len(order))
            yield [tuple(sorted(self._numbers[order[i]] for i in group)) for group in groups]


def _deal(samples: Samples, main: IntArray, steps: int, bands: int) -> list[IntArray]:
    """Numbers of the samples of each step: of every group the longest first, to the step with the fewest tokens of it.

    With bands a group is first cut by length into parts, each for steps of its own and with their share of its tokens.
    """
    dealt: list[list[int]] = [[] for _ in range(steps)]
    bands = min(bands, steps)
    edges = np.arange(bands + 1) * steps // bands
    total = [0] * steps
    for group in np.unique(samples.group[main]):
        members = main[samples.group[main] == group]
        members = members[np.lexsort((members, -samples.length[members]))]
        length = samples.length[members]
        at_step = (np.cumsum(length) - (length + 1) // 2) * steps // int(length.sum())
        for first, behind in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            queue = [(0, total[s], s) for s in range(first, behind)]
            heapq.heapify(queue)
            for i in members[(first <= at_step) & (at_step < behind)].tolist():
                tokens, _, s = heapq.heappop(queue)
                n = int(samples.length[i])
                dealt[s].append(i)
                total[s] += n
                heapq.heappush(queue, (tokens + n, total[s], s))
    return [np.array(sorted(numbers), np.int64) for numbers in dealt]
