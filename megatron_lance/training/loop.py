"""The training loop.

Station: feed -> forward and backward -> optimizer -> metrics and checkpoints, step by step.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_lance.checkpoint.saver import Saver, SaveTimes
from megatron_lance.config.errors import NonFiniteError
from megatron_lance.config.schema import RunConfig, TrainingConfig
from megatron_lance.parallel.groups import Groups
from megatron_lance.training.feed import Feed, StepInputs
from megatron_lance.training.metrics import MetricsWriter, StepMetrics
from megatron_lance.training.preview import Preview
from megatron_lance.training.setup import Trainee
from megatron_lance.training.step import StepLosses, forward_backward

logger = logging.getLogger(__name__)


def update(trainee: Trainee, losses: StepLosses) -> tuple[float, bool]:
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
    if trainee.average is not None:
        trainee.average.update()
    return norm, False


def run_step(
    step: int, run: RunConfig, trainee: Trainee, feed: Feed, groups: Groups, saving: SaveTimes
) -> tuple[StepMetrics, StepInputs]:
    """One whole step, counted from 0: inputs, forward and backward, update.

    Args:
        step: its number.
        run: the whole configuration.
        trainee: model, optimizer, scheduler.
        feed: inputs by step number.
        groups: degrees and ranks.
        saving: what checkpoints cost since the step before.

    Returns:
        (its metrics, its inputs).
    """
    start = time.perf_counter()
    inputs = feed.step(step)
    ready = time.perf_counter()
    trainee.scheduler.step(increment=1)
    losses = forward_backward(trainee, inputs.batches, inputs.counts, run.objective, groups, broken=inputs.broken)
    norm, skipped = update(trainee, losses)
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
        broken=losses.broken,
        loss_by_task=losses.by_task,
        skipped=skipped,
        save_stall_seconds=saving.stall_seconds,
        save_seconds=saving.seconds,
    )
    return metrics, inputs


def _check_finite(metrics: StepMetrics, inputs: StepInputs, bad_in_a_row: int, limit: int) -> None:
    """Warn of a step that was left out; raise NonFiniteError after `limit` in a row."""
    if metrics.skipped:
        logger.warning("step %d: loss or gradients are not finite in packs %s", metrics.step, inputs.packs)
    if metrics.skipped and bad_in_a_row >= limit:
        raise NonFiniteError(
            f"step {metrics.step}: {bad_in_a_row} steps in a row were not finite, the last with packs "
            f"{inputs.packs}; lower optimizer.lr or inspect them with tools/inspect_pack.py"
        )


class Reporter:
    """Says how a run goes: to its folder, and by log lines or a progress bar.

    Args:
        settings: of the run.
        steps_done: before this process.
        enabled: False on all ranks but the first.
    """

    def __init__(self, settings: TrainingConfig, steps_done: int, enabled: bool) -> None:
        self.settings, self.steps_done, self.enabled = settings, steps_done, enabled
        self.bar_wanted = enabled and settings.progress

    def __enter__(self) -> Reporter:
        with ExitStack() as stack:
            writer = MetricsWriter(Path(self.settings.run_dir), self.enabled, self.steps_done)
            self.writer = stack.enter_context(writer)
            steps, done = self.settings.train_iters, self.steps_done
            bar = tqdm(desc="train", unit="step", total=steps, initial=done, disable=not self.bar_wanted)
            self.bar = stack.enter_context(bar)
            if self.bar_wanted:
                stack.enter_context(logging_redirect_tqdm())
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def step(self, metrics: StepMetrics) -> None:
        """Report one step."""
        self.writer.write(metrics)
        self.bar.set_postfix(loss=f"{metrics.loss:.4f}", tokens_per_s=f"{metrics.tokens_per_second:.0f}", refresh=False)
        self.bar.update()
        due = metrics.step % self.settings.log_interval == 0 and not self.bar_wanted
        if self.enabled and (due or metrics.skipped):
            logger.info(metrics.line(self.settings.train_iters))


def train(
    run: RunConfig,
    trainee: Trainee,
    feed: Feed,
    groups: Groups,
    saver: Saver,
    steps_done: int = 0,
    preview: Preview | None = None,
) -> list[StepMetrics]:
    """Run all steps that are left.

    Args:
        run: the whole configuration.
        trainee: model, optimizer, scheduler.
        feed: inputs by step number.
        groups: degrees and ranks.
        saver: writes checkpoints.
        steps_done: by the process before this one.
        preview: draws pictures for TensorBoard.

    Returns:
        the metrics of the steps of this process.

    Raises:
        NonFiniteError: after `training.max_nonfinite_steps` in a row; names the packs.
        StoreError: if a checkpoint cannot be written.
    """
    settings = run.training
    history: list[StepMetrics] = []
    bad_in_a_row = 0
    with Reporter(settings, steps_done, dist.get_rank() == 0) as reporter:
        for step in range(steps_done, settings.train_iters):
            metrics, inputs = run_step(step, run, trainee, feed, groups, saver.take_times())
            history.append(metrics)
            reporter.step(metrics)
            saver.poll()
            bad_in_a_row = bad_in_a_row + 1 if metrics.skipped else 0
            if bad_in_a_row >= settings.max_nonfinite_steps:
                saver.finish()
            _check_finite(metrics, inputs, bad_in_a_row, settings.max_nonfinite_steps)
            due = settings.save_interval > 0 and metrics.step % settings.save_interval == 0
            if due or metrics.step == settings.train_iters:
                saver.save(metrics.step)
            if preview is not None and (
                metrics.step % run.preview.interval == 0 or metrics.step == settings.train_iters
            ):
                reporter.writer.write_pictures(preview.captions, preview.draw(), metrics.step)
        saver.finish()
    return history
