"""One step: forward and backward over the micro-batches of a global batch by megatron-core's schedules.

Station: dispatch -> [schedule over forward_step] -> gradients.  Losses are sums divided by the step's global row
counts, which the pack index knows beforehand, so gradients need no further scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_lance.config.schema import ObjectiveConfig
from megatron_lance.model.heads import HeadOutputs
from megatron_lance.objectives.losses import (
    TASKS,
    LossCounts,
    sums_by_task,
    total_loss,
    velocity_error,
    weighted_sum,
)
from megatron_lance.parallel.dispatch import RankBatch
from megatron_lance.parallel.groups import Groups
from megatron_lance.training.setup import Trainee

LossFunction = Callable[[HeadOutputs], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StepLosses:
    """Losses of a step over its whole global batch, the same on every rank.

    Attributes:
        total: weighted sum of the two.
        ce: mean over CE rows, nats per token; 0 if there is none.
        velocity: mean over velocity rows; 0 if there is none.
        broken: visual segments that could not be read.
        by_task: mean over the loss rows of each task that has any: CE of understanding, velocity of generation.
    """

    total: float
    ce: float
    velocity: float
    broken: int
    by_task: dict[str, float]


def _pack_loss(
    outputs: HeadOutputs, *, batch: RankBatch, counts: LossCounts, objective: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss of this rank's rows, no token count, its sums) as megatron-core's schedules want it.

    Sums, float32 [2 + 2 * tasks]: CE, velocity, CE by task, velocity by task.
    """
    error = velocity_error(outputs.velocity, batch.target)
    ce_sum, velocity_sum = weighted_sum(outputs.ce, batch.ce_weights), weighted_sum(error, batch.velocity_weights)
    loss = total_loss(ce_sum, velocity_sum, counts, ce_weight=objective.ce_weight, mse_weight=objective.mse_weight)
    no_count = torch.zeros((), dtype=torch.int, device=loss.device)
    by_task = (
        sums_by_task(outputs.ce, batch.ce_weights, batch.ce_tasks),
        sums_by_task(error, batch.velocity_weights, batch.velocity_tasks),
    )
    return loss, no_count, torch.cat([torch.stack([ce_sum, velocity_sum]).detach(), *by_task])


def _forward_step(
    batches: Iterator[RankBatch], model: Callable[[RankBatch], Any], *, counts: LossCounts, objective: ObjectiveConfig
) -> tuple[Any, LossFunction]:
    batch = next(batches)
    return model(batch), partial(_pack_loss, batch=batch, counts=counts, objective=objective)


def _global_losses(
    sums: Sequence[torch.Tensor], broken: int, counts: LossCounts, objective: ObjectiveConfig, groups: Groups
) -> StepLosses:
    """Sum loss sums and broken segments over all ranks; the one point where the host waits for the device."""
    tasks = len(TASKS)
    local = torch.zeros(3 + 2 * tasks, dtype=torch.float64, device=groups.device)
    if sums:
        local[:-1] = torch.stack(list(sums)).sum(0)
    if groups.tp_rank != 0:  # CE is the same on all tp ranks; count it once
        local[0] = 0.0
        local[2 : 2 + tasks] = 0.0
    if groups.replica.rank() == 0:
        local[-1] = broken  # the same on all ranks of a replica; count it once
    dist.all_reduce(local)
    ce_sum, velocity_sum, *of_tasks, all_broken = local.tolist()
    of_kind = {False: of_tasks[:tasks], True: of_tasks[tasks:]}  # by Task.is_generation
    by_task = {
        str(task): of_kind[task.is_generation][i] / counts.by_task[i]
        for i, task in enumerate(TASKS)
        if counts.by_task[i]
    }
    return StepLosses(
        total=float(
            total_loss(local[0], local[1], counts, ce_weight=objective.ce_weight, mse_weight=objective.mse_weight)
        ),
        ce=ce_sum / max(counts.ce, 1),
        velocity=velocity_sum / max(counts.velocity, 1),
        broken=int(all_broken),
        by_task=by_task,
    )


def forward_backward(
    trainee: Trainee,
    batches: Sequence[RankBatch],
    counts: LossCounts,
    objective: ObjectiveConfig,
    groups: Groups,
    *,
    broken: int,
    forward_only: bool = False,
) -> StepLosses:
    """Run a step's micro-batches; gradients end up reduced in the chunks' gradient buffers.

    Args:
        trainee: model and optimizer.
        batches: this replica's micro-batches as this rank sees them, on its device.
        counts: loss rows of the global batch.
        objective: loss weights.
        groups: degrees and ranks.
        broken: visual segments of this replica's packs that could not be read.
        forward_only: leave out backward.

    Returns:
        the global batch's losses.
    """
    for chunk in trainee.chunks:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    rows = sum(batches[0].region_rows)
    sums = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, counts=counts, objective=objective),
        data_iterator=[iter(batches) for _ in trainee.chunks],
        model=trainee.chunks,
        num_microbatches=len(batches),
        seq_length=rows * groups.cp,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return _global_losses(sums, broken, counts, objective, groups)
