"""Mixture: in which order the rows of several sources are seen.

Station: sources -> [mixture] -> record -> task.  In: row groups and weight of each source, the seed.  Out: draws of
(source, row, epoch), the same for every run with the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from megatron_lance.config.loader import ConfigError
from megatron_lance.packing.rng import stream


@dataclass(frozen=True)
class MixtureSource:
    """A source as the mixture sees it.

    Attributes:
        name: its own.
        groups: rows of each row group, in the order of the files.
        weight: relative share of samples.
    """

    name: str
    groups: tuple[int, ...]
    weight: float

    @property
    def rows(self) -> int:
        """Of all row groups."""
        return sum(self.groups)


@dataclass(frozen=True)
class Draw:
    """One row to train on.

    Attributes:
        source: number of the source.
        row: row of the source, counted over its files.
        epoch: how often the source was gone through before.
    """

    source: int
    row: int
    epoch: int


def mix(sources: Sequence[MixtureSource], seed: int, epochs: int, mixed_groups: int) -> Iterator[Draw]:
    """Draws of `epochs` epochs.

    An epoch has as many draws as the sources of positive weight together have rows.  Each next draw is from the source
    furthest behind its share, so every stretch holds the shares closely.  A source is gone through in an order of its
    own that is new in each pass, and starts over when it is used up: with weights in proportion to the rows an epoch
    sees every row once; else small sources repeat within an epoch and large ones go on in the next.

    In the order of a source its row groups are shuffled, and the rows of every `mixed_groups` of them: the rows of a
    row group, which is read at once, are drawn in one stretch, yet neighbours in a file are not neighbours there.

    Args:
        sources: what is mixed.
        seed: the run's seed.
        epochs: how many.
        mixed_groups: row groups whose rows are shuffled together.

    Raises:
        ConfigError: if there is no source, one has no rows, a weight is negative, or all are 0.
    """
    if epochs < 1:
        raise ConfigError(f"data.epochs {epochs}: must be at least 1")
    for source in sources:
        if source.rows < 1 and source.weight > 0.0:
            raise ConfigError(f"data.sources {source.name}: has no rows; remove it or give it data")
        if not source.weight >= 0.0:
            raise ConfigError(f"data.sources {source.name}.weight {source.weight}: must not be negative")
    weights = np.array([source.weight for source in sources], dtype=np.float64)
    if not weights.sum() > 0.0:
        raise ConfigError("data.sources: no source with a positive weight; add one")
    orders = [_order(number, source, seed, mixed_groups) for number, source in enumerate(sources)]
    return _draws(orders, weights / weights.sum(), epochs * sum(s.rows for s in sources if s.weight > 0.0))


def _draws(orders: Sequence[Iterator[Draw]], share: np.ndarray, draws: int) -> Iterator[Draw]:
    drawn = np.zeros(len(orders), dtype=np.int64)
    for position in range(draws):
        i = int(np.argmax(share * (position + 1) - drawn))
        drawn[i] += 1
        yield next(orders[i])


def _order(number: int, source: MixtureSource, seed: int, mixed_groups: int) -> Iterator[Draw]:
    """All draws of a source, pass after pass, without end."""
    starts = np.cumsum((0, *source.groups))
    for epoch in count():
        random = stream(seed, "mixture", source.name, epoch)
        groups = random.permutation(len(source.groups))
        for first in range(0, len(groups), mixed_groups):
            together = groups[first : first + mixed_groups]
            rows = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in together])
            for row in random.permutation(rows).tolist():
                yield Draw(number, row, epoch)
