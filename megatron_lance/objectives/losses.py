"""The two losses as (weighted sum); counts are known beforehand from the pack index (spec/model.md section 6).

Station: heads -> [losses] -> gradients.  A step's loss is sum of local rows / global row count for each loss, so no
mean of means exists and any layout gives the same value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812

from megatron_lance.packing.sample import Pack, Task

TASKS = tuple(Task)
"""Order of sums and counts by task."""


@dataclass(frozen=True)
class LossCounts:
    """Global loss rows of a step, over all packs of its global batch.

    Attributes:
        ce: rows with a CE loss.
        velocity: rows with a velocity loss.
        by_task: rows of each of TASKS; a task has loss rows of one kind, see Task.is_generation.
        by_source: rows of each data source, by its name; empty where samples have none.
    """

    ce: int
    velocity: int
    by_task: tuple[int, ...]
    by_source: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, packs: Iterable[Pack], sources: Sequence[Sequence[str]] = ()) -> LossCounts:
        """The loss rows of some packs.

        Args:
            packs: some.
            sources: name of each sample's source, pack by pack; empty where samples have none.
        """
        rows = dict.fromkeys(TASKS, 0)
        of_source = dict.fromkeys(sorted({name for names in sources for name in names}), 0)
        ce = velocity = 0
        for number, pack in enumerate(packs):
            for index, sample in enumerate(pack.samples):
                own = sample.velocity_rows if sample.task.is_generation else sample.ce_rows
                rows[sample.task] += own
                if sources:
                    of_source[sources[number][index]] += own
                ce, velocity = ce + sample.ce_rows, velocity + sample.velocity_rows
        return cls(ce, velocity, tuple(rows.values()), of_source)

    def plus(self, other: LossCounts) -> LossCounts:
        """The loss rows of both."""
        by_task = tuple(a + b for a, b in zip(self.by_task, other.by_task, strict=True))
        by_source = dict(Counter(self.by_source) + Counter(other.by_source))
        return LossCounts(self.ce + other.ce, self.velocity + other.velocity, by_task, by_source)


def weighted_sum(per_row: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over rows of per_row * weights, float32 scalar; both [rows]."""
    return (per_row.float() * weights).sum()


def sums_by_task(per_row: torch.Tensor, weights: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
    """Sums over the rows of each of TASKS of per_row * weights: float32 [tasks]; tasks is int64 [rows]."""
    return (per_row.detach().float() * weights) @ F.one_hot(tasks, len(TASKS)).float()


def sums_by_source(per_row: torch.Tensor, weights: torch.Tensor, sources: torch.Tensor, count: int) -> torch.Tensor:
    """Sums over the rows of each source of per_row * weights: float32 [count]; sources is int64 [rows]."""
    sums = torch.zeros(max(count, 1), device=per_row.device)
    return sums.index_add_(0, sources, per_row.detach().float() * weights)[:count]


def velocity_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error averaged over channels: [rows, C] x 2 -> float32 [rows]."""
    return (prediction.float() - target.float()).square().mean(dim=-1)


def total_loss(
    ce_sum: torch.Tensor, velocity_sum: torch.Tensor, counts: LossCounts, *, ce_weight: float, mse_weight: float
) -> torch.Tensor:
    """ce_weight * CE / N_ce + mse_weight * velocity / N_v; a loss without rows in the step is zero."""
    return ce_weight * ce_sum / max(counts.ce, 1) + mse_weight * velocity_sum / max(counts.velocity, 1)
