"""One step: forward and backward over the micro-batches of a global batch by megatron-core's schedules.

Station: dispatch -> [schedule over forward_step] -> gradients, or losses alone in validation.  Losses are sums divided
by the step's global row counts, which the pack index knows beforehand, so gradients need no further scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    sums_by_source,
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
class LossSums:
    """Sums over the loss rows of some packs, the same on every rank.

    Attributes:
        ce: nats of all CE rows.
        velocity: of all velocity rows.
        by_task: of each of TASKS: CE of understanding, velocity of generation.
        broken: visual segments that could not be read.
        by_source: as by_task, of each data source by its name; empty where samples have none.
    """

    ce: float
    velocity: float
    by_task: tuple[float, ...]
    broken: int
    by_source: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Sequence[float], counts: LossCounts) -> LossSums:
        """What the values of `_own_values`, summed over all ranks, say.

        Args:
            values: 3 + 2 * (tasks + sources).
            counts: that name the sources.
        """
        tasks, parts = len(TASKS), len(TASKS) + len(counts.by_source)
        ce, velocity, *of_parts, broken = values
        of_kind = {False: of_parts[:parts], True: of_parts[parts:]}  # by Task.is_generation
        by_task = tuple(of_kind[task.is_generation][i] for i, task in enumerate(TASKS))
        # a source has one task, so one of its two sums is zero
        by_source = {name: of_kind[False][i] + of_kind[True][i] for i, name in enumerate(counts.by_source, tasks)}
        return cls(ce, velocity, by_task, int(broken), by_source)

    def plus(self, other: LossSums) -> LossSums:
        """The sums of both."""
        by_task = tuple(a + b for a, b in zip(self.by_task, other.by_task, strict=True))
        names = sorted({*self.by_source, *other.by_source})
        by_source = {name: self.by_source.get(name, 0.0) + other.by_source.get(name, 0.0) for name in names}
        broken = self.broken + other.broken
        return LossSums(self.ce + other.ce, self.velocity + other.velocity, by_task, broken, by_source)


@dataclass(frozen=True)
class StepLosses:
    """Losses over whole packs, in training those of a step's global batch; the same on every rank.

    Attributes:
        total: weighted sum of the two.
        ce: mean over CE rows, nats per token; 0 if there is none.
        velocity: mean over velocity rows; 0 if there is none.
        broken: visual segments that could not be read.
        by_task: mean over the loss rows of each task that has any: CE of understanding, velocity of generation.
        by_source: the same of each data source that has any, by its name.
    """

    total: float
    ce: float
    velocity: float
    broken: int
    by_task: dict[str, float]
    by_source: dict[str, float]

    @classmethod
    def of(cls, sums: LossSums, counts: LossCounts, objective: ObjectiveConfig) -> StepLosses:
        """Means of some sums.

        Args:
            sums: over all loss rows of the packs.
            counts: those rows.
            objective: loss weights.
        """
        ce, velocity = torch.tensor([sums.ce, sums.velocity], dtype=torch.float64)
        total = total_loss(ce, velocity, counts, ce_weight=objective.ce_weight, mse_weight=objective.mse_weight)
        return cls(
            total=float(total),
            ce=sums.ce / max(counts.ce, 1),
            velocity=sums.velocity / max(counts.velocity, 1),
            broken=sums.broken,
            by_task={str(t): s / n for t, s, n in zip(TASKS, sums.by_task, counts.by_task, strict=True) if n},
            by_source={name: sums.by_source[name] / rows for name, rows in counts.by_source.items() if rows},
        )


@dataclass(frozen=True)
class OwnLosses:
    """What one rank knows of a step's losses; nothing of it has left the device.

    Attributes:
        by_pack: float32 [2 + 2 * (tasks + sources)] of each micro-batch, see `_pack_loss`; on the last stage only.
        values: float64 [3 + 2 * (tasks + sources)], what all ranks are to add up.
        counts: loss rows of the global batch.
        objective: loss weights.
    """

    by_pack: Sequence[torch.Tensor]
    values: torch.Tensor
    counts: LossCounts
    objective: ObjectiveConfig

    def total(self, values: torch.Tensor) -> StepLosses:
        """The global batch's losses.

        Args:
            values: float64, those of all ranks added up, on the CPU.
        """
        return StepLosses.of(LossSums.of(values.tolist(), self.counts), self.counts, self.objective)


def _pack_loss(
    outputs: HeadOutputs, *, batch: RankBatch, counts: LossCounts, objective: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss of this rank's rows, no token count, its sums) as megatron-core's schedules want it.

    Sums, float32 [2 + 2 * (tasks + sources)]: CE, velocity, CE by task and by source, velocity by task and by source.
    """
    error = velocity_error(outputs.velocity, batch.target)
    ce_sum, velocity_sum = weighted_sum(outputs.ce, batch.ce_weights), weighted_sum(error, batch.velocity_weights)
    loss = total_loss(ce_sum, velocity_sum, counts, ce_weight=objective.ce_weight, mse_weight=objective.mse_weight)
    no_count = torch.zeros((), dtype=torch.int, device=loss.device)
    sources = len(counts.by_source)
    parts = (
        sums_by_task(outputs.ce, batch.ce_weights, batch.ce_tasks),
        sums_by_source(outputs.ce, batch.ce_weights, batch.ce_sources, sources),
        sums_by_task(error, batch.velocity_weights, batch.velocity_tasks),
        sums_by_source(error, batch.velocity_weights, batch.velocity_sources, sources),
    )
    return loss, no_count, torch.cat([torch.stack([ce_sum, velocity_sum]).detach(), *parts])


def _forward_step(
    batches: Iterator[RankBatch], model: Callable[[RankBatch], Any], *, counts: LossCounts, objective: ObjectiveConfig
) -> tuple[Any, LossFunction]:
    batch = next(batches)
    return model(batch), partial(_pack_loss, batch=batch, counts=counts, objective=objective)


def _own_values(sums: Sequence[torch.Tensor], counts: LossCounts, broken: int, groups: Groups) -> torch.Tensor:
    """Loss sums and broken segments of this rank, each counted on one of the ranks that know it."""
    parts = len(TASKS) + len(counts.by_source)
    local = torch.zeros(3 + 2 * parts, dtype=torch.float64, device=groups.device)
    if sums:
        local[:-1] = torch.stack(list(sums)).sum(0)
    if groups.tp_rank != 0:  # CE is the same on all tp ranks; count it once
        local[0] = 0.0
        local[2 : 2 + parts] = 0.0
    if groups.replica.rank() == 0:
        local[-1] = broken  # the same on all ranks of a replica; count it once
    return local


def _schedule(
    trainee: Trainee,
    batches: Sequence[RankBatch],
    counts: LossCounts,
    objective: ObjectiveConfig,
    groups: Groups,
    *,
    forward_only: bool,
) -> Sequence[torch.Tensor]:
    """This rank's loss sums of all micro-batches; on the last stage only."""
    rows = sum(batches[0].region_rows)
    sums: Sequence[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, counts=counts, objective=objective),
        data_iterator=[iter(batches) for _ in trainee.chunks],
        model=trainee.chunks,
        num_microbatches=len(batches),
        seq_length=rows * groups.cp,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return sums


def forward_backward(
    trainee: Trainee,
    batches: Sequence[RankBatch],
    counts: LossCounts,
    objective: ObjectiveConfig,
    groups: Groups,
    *,
    broken: int,
) -> OwnLosses:
    """Run a step's micro-batches; gradients end up reduced in the chunks' gradient buffers.

    Args:
        trainee: model and optimizer.
        batches: this replica's micro-batches as this rank sees them, on its device.
        counts: loss rows of the global batch.
        objective: loss weights.
        groups: degrees and ranks.
        broken: visual segments of this replica's packs that could not be read.

    Returns:
        this rank's part of the losses; `update` makes them whole.
    """
    for chunk in trainee.chunks:
        chunk.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    trainee.clock.begin()
    sums = _schedule(trainee, batches, counts, objective, groups, forward_only=False)
    return OwnLosses(sums, _own_values(sums, counts, broken, groups), counts, objective)


@torch.no_grad()
def forward(
    trainee: Trainee,
    batches: Sequence[RankBatch],
    counts: LossCounts,
    objective: ObjectiveConfig,
    groups: Groups,
    *,
    broken: int,
) -> LossSums:
    """Loss sums alone; gradients and what reduces them are not touched.  Arguments as of `forward_backward`.

    The model's weights must be whole, see `Trainee.at_rest`.
    """
    sums = _schedule(trainee, batches, counts, objective, groups, forward_only=True)
    values = _own_values(sums, counts, broken, groups)
    dist.all_reduce(values)
    return LossSums.of(values.tolist(), counts)
