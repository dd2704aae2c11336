"""The update of a step, and the one exchange that all ranks need for it.

Station: gradients, reduced -> [update] -> metrics, guards.  What ranks tell one another about a step travels in one
small gather, at the only point where the host waits for the device anyway: sums of losses, gradient norms of the
experts, memory, and pulses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_lance.checkpoint.everywhere import of_all_ranks
from megatron_lance.training.gauges import Readings
from megatron_lance.training.pulse import Pulse
from megatron_lance.training.setup import Trainee
from megatron_lance.training.step import OwnLosses, StepLosses


@dataclass(frozen=True)
class Update:
    """What an update was; the same on every rank.

    Attributes:
        losses: of the global batch.
        norm: of the gradient, before clipping.
        skipped: whether it was left out.
        readings: gradient norms by expert, and memory.
        pulses: of all ranks, by rank.
    """

    losses: StepLosses
    norm: float
    skipped: bool
    readings: Readings
    pulses: Sequence[Pulse]


def exchange(*own: torch.Tensor) -> list[torch.Tensor]:
    """Small vectors of every rank by one gather; a collective of the world.

    Args:
        own: float64 [n] each, on the device of the process groups; n is the same on all ranks.

    Returns:
        float64 [ranks, n] each, on the CPU.
    """
    mine = torch.cat(own)
    everyone = torch.empty(dist.get_world_size() * len(mine), dtype=mine.dtype, device=mine.device)
    dist.all_gather_into_tensor(everyone, mine)
    return list(everyone.view(-1, len(mine)).cpu().split([len(vector) for vector in own], dim=1))


def update(trainee: Trainee, own: OwnLosses, pulse: Callable[[], Pulse] = Pulse) -> Update:
    """Clip and update unless the loss or the gradients are not finite; a collective of the world.

    All ranks decide alike: losses are summed over all ranks in the same order, and the gradient norm is reduced over
    the model after gradients were reduced over replicas.

    Args:
        trainee: whose gradients are complete.
        own: what this rank knows of the losses.
        pulse: asked for once the host has waited for the gradients.
    """
    optimizer = trainee.optimizer
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    told = torch.tensor(pulse().values, dtype=torch.float64, device=own.values.device)
    values, gauges, pulses = exchange(own.values, trainee.gauges.own(), told)
    losses = own.total(values.sum(0))
    skipped = not (math.isfinite(losses.total) and math.isfinite(norm))
    if not skipped:
        for part in optimizer.chained_optimizers:
            if part.get_parameters() and part.config.clip_grad > 0.0:
                clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=part.config.clip_grad, total_norm=norm)
        optimizer.step_with_ready_grads()
        if trainee.average is not None:
            trainee.average.update()
    return Update(losses, norm, skipped, Readings.of(gauges), [Pulse.of(row) for row in pulses.tolist()])


def not_finite(own: OwnLosses, packs: Sequence[int]) -> list[int]:
    """Packs whose own loss is not finite, of all ranks; a collective of the world.

    Args:
        own: what this rank knows of the losses.
        packs: numbers of this rank's micro-batches.
    """
    bad = [number for number, sums in zip(packs, own.by_pack, strict=False) if not bool(sums.isfinite().all())]
    return sorted({number for each in of_all_ranks(bad) for number in each})
