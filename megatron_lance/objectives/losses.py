"""The two losses as (weighted sum); counts are known beforehand from the pack index (spec/model.md section 6).

Station: heads -> [losses] -> gradients.  A step's loss is sum of local rows / global row count for each loss, so no
mean of means exists and any layout gives the same value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossCounts:
    """Global loss rows of a step, over all packs of its global batch.

    Attributes:
        ce: rows with a CE loss.
        velocity: rows with a velocity loss.
    """

    ce: int
    velocity: int


def weighted_sum(per_row: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over rows of per_row * weights, float32 scalar; both [rows]."""
    return (per_row.float() * weights).sum()


def velocity_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared error averaged over channels: [rows, C] x 2 -> float32 [rows]."""
    return (prediction.float() - target.float()).square().mean(dim=-1)


def total_loss(
    ce_sum: torch.Tensor, velocity_sum: torch.Tensor, counts: LossCounts, *, ce_weight: float, mse_weight: float
) -> torch.Tensor:
    """ce_weight * CE / N_ce + mse_weight * velocity / N_v; a loss without rows in the step is zero."""
    return ce_weight * ce_sum / max(counts.ce, 1) + mse_weight * velocity_sum / max(counts.velocity, 1)
