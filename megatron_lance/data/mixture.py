"""Mixture: in which order the rows of several sources are seen.

Station: sources -> [mixture] -> record -> task.  In: rows and weight of each source, the seed.  Out: draws of
(source, row, epoch), the same for every run with the same arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lance.config.loader import ConfigError
from megatron_lance.packing.rng import stream


@dataclass(frozen=True)
class MixtureSource:
    """A source as the mixture sees it: name, rows, and weight (relative share of samples)."""

    name: str
    rows: int
    weight: float


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


def mix(sources: Sequence[MixtureSource], seed: int, epochs: int = 1) -> Iterator[Draw]:
    """Draws of `epochs` epochs.

    An epoch has as many draws as the sources of positive weight together have rows.  Each next draw is from the source
    furthest behind its share, so every stretch holds the shares closely.  A source is gone through in an order of its
    own that is new in each pass, and starts over when it is used up: with weights in proportion to the rows an epoch
    sees every row once; else small sources repeat within an epoch and large ones go on in the next.

    Args:
        sources: what is mixed.
        seed: the run's seed.
        epochs: how many.

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
    return _draws(sources, weights / weights.sum(), seed, epochs)


def _draws(sources: Sequence[MixtureSource], share: np.ndarray, seed: int, epochs: int) -> Iterator[Draw]:
    drawn = np.zeros(len(sources), dtype=np.int64)
    orders: dict[int, np.ndarray] = {}
    rows = sum(source.rows for source in sources if source.weight > 0.0)
    for position in range(epochs * rows):
        i = int(np.argmax(share * (position + 1) - drawn))
        epoch, at = divmod(int(drawn[i]), sources[i].rows)
        if at == 0:
            orders[i] = stream(seed, "mixture", sources[i].name, epoch).permutation(sources[i].rows)
        drawn[i] += 1
        yield Draw(i, int(orders[i][at]), epoch)
