"""The training loop.

Station: feed -> forward and backward -> optimizer -> metrics, step by step.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_lance.config.errors import NonFiniteError
from megatron_lance.config.schema import RunConfig
from megatron_lance.parallel.groups import Groups
from megatron_lance.training.feed import Feed, StepInputs
from megatron_lance.training.metrics import MetricsWriter, StepMetrics
from megatron_lance.training.setup import Trainee
from megatron_lance.training.step import StepLosses, forward_backward

logger = logging.getLogger(__name__)


def _update(trainee: Trainee, losses: StepLosses) -> tuple[float, bool]:
    """Clip and update unless the loss or the gradients are not finite; all ranks decide alike.

    The loss is a sum over all ranks and the gradient norm is reduced over the model, and gradients are already
    reduced over replicas, so every rank sees the same two numbers.

    Returns:
        (gradient norm, whether the update was left out).
    """
    optimizer = trainee.optimizer
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not (math.isfinite(losses.total) and math.isfinite(norm)):
        return norm, True
    for part in optimizer.chained_optimizers:
        if part.get_parameters() and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm, False


def run_step(step: int, run: RunConfig, trainee: Trainee, feed: Feed, groups: Groups) -> tuple[StepMetrics, StepInputs]:
    """One whole step, counted from 0: inputs, forward and backward, update.

    Returns:
        (its metrics, its inputs).
    """
    start = time.perf_counter()
    inputs = feed.step(step)
    ready = time.perf_counter()
    trainee.scheduler.step(increment=1)
    losses = forward_backward(trainee, inputs.batches, inputs.counts, run.objective, groups)
    norm, skipped = _update(trainee, losses)
    seconds = time.perf_counter() - start
    metrics = StepMetrics(
        step=step + 1,
        loss=losses.total,
        ce_loss=losses.ce,
        velocity_loss=losses.velocity,
        grad_norm=norm,
        learning_rate=float(trainee.optimizer.param_groups[0]["lr"]),
        tokens_per_second=inputs.tokens / seconds,
        fill=inputs.tokens / inputs.capacity,
        step_seconds=seconds,
        data_seconds=ready - start,
        broken=inputs.broken,
        skipped=skipped,
    )
    return metrics, inputs


def train(run: RunConfig, trainee: Trainee, feed: Feed, groups: Groups) -> list[StepMetrics]:
    """Run all steps.

    Args:
        run: the whole configuration.
        trainee: model, optimizer, scheduler.
        feed: inputs by step number.
        groups: degrees and ranks.

    Returns:
        the metrics of all steps.

    Raises:
        NonFiniteError: after `training.max_nonfinite_steps` in a row; names the packs.
    """
    first_rank, settings = dist.get_rank() == 0, run.training
    history: list[StepMetrics] = []
    bad_in_a_row = 0
    with MetricsWriter(Path(settings.run_dir), first_rank) as writer:
        for step in range(settings.train_iters):
            metrics, inputs = run_step(step, run, trainee, feed, groups)
            history.append(metrics)
            writer.write(metrics)
            if first_rank and (metrics.step % settings.log_interval == 0 or metrics.skipped):
                logger.info(metrics.line(settings.train_iters))
            bad_in_a_row = bad_in_a_row + 1 if metrics.skipped else 0
            if metrics.skipped:
                logger.warning("step %d: loss or gradients are not finite in packs %s", metrics.step, inputs.packs)
            if bad_in_a_row >= settings.max_nonfinite_steps:
                raise NonFiniteError(
                    f"step {metrics.step}: {bad_in_a_row} steps in a row were not finite, the last with packs "
                    f"{inputs.packs}; lower optimizer.lr or inspect them with tools/inspect_pack.py"
                )
    return history
