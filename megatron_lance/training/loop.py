"""The training loop.

Station: feed -> forward and backward -> optimizer -> metrics and checkpoints, step by step.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_lance.checkpoint.saver import Saver, SaveTimes
from megatron_lance.config.errors import NonFiniteError, Stopped
from megatron_lance.config.schema import RunConfig, TrainingConfig
from megatron_lance.parallel.groups import Groups
from megatron_lance.profiling.devices import peak_tflops
from megatron_lance.profiling.flops import Speed
from megatron_lance.training.events import EventLog
from megatron_lance.training.feed import Feed, StepInputs
from megatron_lance.training.guards import Guards
from megatron_lance.training.metrics import MetricsWriter, StepMetrics
from megatron_lance.training.preview import Preview, Samples
from megatron_lance.training.setup import Trainee
from megatron_lance.training.spikes import SpikeWatch
from megatron_lance.training.step import StepLosses, forward_backward
from megatron_lance.training.validation import Validation, ValidationMetrics
from megatron_lance.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Update(NamedTuple):
    """What an update was.

    Attributes:
        norm: of the gradient, before clipping.
        skipped: whether it was left out.
        by_expert: gradient norm of each of gradient_norms.PARTS.
        memory_bytes: most memory of any rank since the update before.
    """

    norm: float
    skipped: bool
    by_expert: dict[str, float]
    memory_bytes: int


def update(trainee: Trainee, losses: StepLosses) -> Update:
    """Clip and update unless the loss or the gradients are not finite; all ranks decide alike.

    The loss is a sum over all ranks and the gradient norm is reduced over the model, and gradients are already
    reduced over replicas, so every rank sees the same two numbers.

    A collective of the world.
    """
    optimizer = trainee.optimizer
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    by_expert, memory = trainee.gauges.read()
    if not (math.isfinite(losses.total) and math.isfinite(norm)):
        return Update(norm, True, by_expert, memory)
    for part in optimizer.chained_optimizers:
        if part.get_parameters() and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    if trainee.average is not None:
        trainee.average.update()
    return Update(norm, False, by_expert, memory)


def run_step(
    step: int, run: RunConfig, trainee: Trainee, feed: Feed, groups: Groups, saving: SaveTimes, guards: Guards
) -> tuple[StepMetrics, StepInputs]:
    """One whole step, counted from 0: inputs, forward and backward, update.

    Args:
        step: its number.
        run: the whole configuration.
        trainee: model, optimizer, scheduler.
        feed: inputs by step number.
        groups: degrees and ranks.
        saving: what checkpoints cost since the step before.
        guards: told where this rank stands.

    Returns:
        (its metrics, its inputs).
    """
    start = time.perf_counter()
    guards.watchdog.at("data", step + 1)
    inputs = feed.step(step)
    ready = time.perf_counter()
    guards.watchdog.at("forward and backward", step + 1)
    trainee.scheduler.step(increment=1)
    losses = forward_backward(trainee, inputs.batches, inputs.counts, run.objective, groups, broken=inputs.broken)
    guards.watchdog.at("update", step + 1)
    done = update(trainee, losses)
    seconds = time.perf_counter() - start
    peak = run.profiling.peak_tflops or peak_tflops(run.training.precision)
    speed = Speed.of(run.model, inputs.work, seconds, dist.get_world_size(), peak, run.training.freeze)
    metrics = StepMetrics(
        step=step + 1,
        loss=losses.total,
        ce_loss=losses.ce,
        velocity_loss=losses.velocity,
        grad_norm=done.norm,
        learning_rate=float(trainee.optimizer.param_groups[0]["lr"]),
        tokens_per_second=inputs.tokens / seconds,
        tflops=speed.tflops,
        mfu=speed.mfu,
        bagel_tflops=speed.bagel_tflops,
        bagel_mfu=speed.bagel_mfu,
        fill=inputs.tokens / inputs.capacity,
        step_seconds=seconds,
        data_seconds=ready - start,
        read_seconds=inputs.read_seconds,
        read_retries=feed.ahead.retries,
        reader_restarts=feed.ahead.restarts,
        broken=losses.broken,
        loss_by_task=losses.by_task,
        loss_by_source=losses.by_source,
        grad_norm_by_expert=done.by_expert,
        tokens_seen=feed.tokens_seen(step + 1),
        memory_bytes=done.memory_bytes,
        skipped=done.skipped,
        save_stall_seconds=saving.stall_seconds,
        save_seconds=saving.seconds,
    )
    return metrics, inputs


class Looks:
    """What is looked at between steps without changing them: losses of held-out packs, and samples.

    Args:
        run: the whole configuration.
        validation: measures losses; None leaves them out.
        preview: samples prompts; None leaves them out.
    """

    def __init__(self, run: RunConfig, validation: Validation | None, preview: Preview | None) -> None:
        self.run, self.validation, self.preview = run, validation, preview

    def _is_due(self, step: int, interval: int) -> bool:
        return step % interval == 0 or step == self.run.training.train_iters

    def after(self, step: int, reporter: Reporter, watchdog: Watchdog, known: Sequence[str] = ()) -> None:
        """Look, if it is time; a collective of the world.

        Args:
            step: steps done.
            reporter: takes what is found.
            watchdog: told of every round.
            known: what need not be looked at again.
        """
        run = self.run
        if self.validation and "validation" not in known and self._is_due(step, run.validation.interval):
            reporter.validation(self.validation.measure(step, partial(watchdog.at, "validation", step)))
        if self.preview and "preview" not in known and self._is_due(step, run.preview.interval):
            reporter.samples(self.preview.sample(step, partial(watchdog.at, "preview", step)))

    def catch_up(self, steps_done: int, reporter: Reporter, watchdog: Watchdog) -> None:
        """What an earlier process did not get to after its last step, because it was ended; a collective."""
        known = [reporter.writer.known(steps_done)]
        dist.broadcast_object_list(known, src=0)
        self.after(steps_done, reporter, watchdog, known[0])


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
            goes_on = self.steps_done < self.settings.train_iters
            writer = MetricsWriter(Path(self.settings.run_dir), self.enabled, self.steps_done if goes_on else None)
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

    def validation(self, metrics: ValidationMetrics) -> None:
        """Report losses of held-out packs."""
        self.writer.write_validation(metrics)
        if self.enabled:
            logger.info(metrics.line())

    def samples(self, samples: Samples) -> None:
        """Report samples."""
        self.writer.write_samples(samples)
        if self.enabled:
            logger.info(
                "preview after step %d: %d samples in %.1f s", samples.step, len(samples.found), samples.seconds
            )
            for line, result in samples.found:
                if isinstance(result, str):
                    logger.info("preview %d: %s -> %s", line.number, line.texts[0], result)


class _Skips:
    """Counts steps in a row that were left out because loss or gradients were not finite.

    Args:
        limit: of them.
        events: where they are noted.
    """

    def __init__(self, limit: int, events: EventLog) -> None:
        self.limit, self.events, self.in_a_row = limit, events, 0

    def after(self, metrics: StepMetrics, packs: Sequence[int]) -> None:
        """Take in a step.

        Raises:
            NonFiniteError: if it is one too many.
        """
        self.in_a_row = self.in_a_row + 1 if metrics.skipped else 0
        if metrics.skipped:
            logger.warning("step %d: loss or gradients are not finite in packs %s", metrics.step, packs)
            self.events.write(metrics.step, "skipped", packs=list(packs))
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"step {metrics.step}: {self.in_a_row} steps in a row were not finite, the last with packs {packs}; "
                "lower optimizer.lr or inspect them with tools/inspect_pack.py"
            )


def train(
    run: RunConfig,
    trainee: Trainee,
    feed: Feed,
    groups: Groups,
    saver: Saver,
    steps_done: int,
    looks: Looks,
    guards: Guards,
) -> list[StepMetrics]:
    """Run all steps that are left.

    Args:
        run: the whole configuration.
        trainee: model, optimizer, scheduler.
        feed: inputs by step number.
        groups: degrees and ranks.
        saver: writes checkpoints; a save that is under way is finished whatever happens here.
        steps_done: by the process before this one.
        looks: what is looked at between steps.
        guards: what ends the run early.

    Returns:
        the metrics of the steps of this process.

    Raises:
        NonFiniteError: after `training.max_nonfinite_steps` in a row; names the packs.
        LossSpike: if the loss stays too high.
        Stopped: if a rank was asked to stop; a checkpoint of the last step done is complete.
        StoreError: if a checkpoint cannot be written.
    """
    settings = run.training
    history: list[StepMetrics] = []
    skips = _Skips(settings.max_nonfinite_steps, guards.events)
    spikes = SpikeWatch(settings.spike_factor, settings.spike_steps, settings.spike_window)
    with Reporter(settings, steps_done, dist.get_rank() == 0) as reporter:
        if steps_done > 0:
            looks.catch_up(steps_done, reporter, guards.watchdog)
        for step in range(steps_done, settings.train_iters):
            metrics, inputs = run_step(step, run, trainee, feed, groups, saver.take_times(), guards)
            history.append(metrics)
            reporter.step(metrics)
            done = metrics.step
            guards.watchdog.at("end of step", done)
            asked = guards.after_step(done, metrics.data_seconds, trainee.clock.busy_seconds, groups)
            saver.poll()
            skips.after(metrics, inputs.packs)
            if not metrics.skipped:
                spikes.after(done, metrics.loss)
            due = settings.save_interval > 0 and done % settings.save_interval == 0
            if due or asked or done == settings.train_iters:
                guards.watchdog.at("save", done)
                guards.events.write(done, "checkpoint", folder=str(saver.save(done)))
            if asked and done < settings.train_iters:
                saver.finish()
                raise Stopped(
                    f"stopped by {asked.text} after step {done} of {settings.train_iters}, which is saved; go on with "
                    "training.resume=auto"
                )
            looks.after(done, reporter, guards.watchdog)
        guards.watchdog.at("save", settings.train_iters)
        saver.finish()
    return history
