"""The training loop.

Station: feed -> forward and backward -> update -> metrics and checkpoints, step by step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

from megatron_lance.checkpoint.saver import Saver
from megatron_lance.config.errors import NonFiniteError, Stopped
from megatron_lance.config.schema import RunConfig
from megatron_lance.parallel.groups import Groups
from megatron_lance.profiling.devices import peak_tflops
from megatron_lance.profiling.flops import Speed
from megatron_lance.training.events import EventLog
from megatron_lance.training.feed import Feed, StepInputs
from megatron_lance.training.guards import Guards
from megatron_lance.training.looks import Looks
from megatron_lance.training.metrics import StepMetrics
from megatron_lance.training.pulse import Pulse
from megatron_lance.training.reporter import Past, Reporter
from megatron_lance.training.setup import Trainee
from megatron_lance.training.spikes import SpikeWatch
from megatron_lance.training.step import forward_backward
from megatron_lance.training.update import Update, not_finite, update

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What a process trains with.

    Attributes:
        run: the whole configuration.
        groups: degrees and ranks.
        trainee: model, optimizer, scheduler.
        feed: inputs by step number.
        saver: writes checkpoints; a save that is under way is finished whatever happens.
        looks: what is looked at between steps.
        guards: what ends the run early.
    """

    run: RunConfig
    groups: Groups
    trainee: Trainee
    feed: Feed
    saver: Saver
    looks: Looks
    guards: Guards

    def pulse(self, data_seconds: float) -> Pulse:
        """What this rank tells the others about a step whose gradients are complete."""
        return Pulse(self.guards.stop.reason, self.groups.dp_rank, data_seconds, self.trainee.clock.busy_seconds)


@dataclass(frozen=True)
class StepDone:
    """One step.

    Attributes:
        metrics: of it.
        pulses: of all ranks.
        suspects: packs to look at, if it was left out: those whose loss is not finite, or else all of them.
    """

    metrics: StepMetrics
    pulses: Sequence[Pulse]
    suspects: Sequence[int]


def run_step(step: int, session: Session) -> StepDone:
    """One whole step, counted from 0: inputs, forward and backward, update; a collective of the world."""
    run, trainee, watchdog = session.run, session.trainee, session.guards.watchdog
    start = time.perf_counter()
    watchdog.at("data", step + 1)
    inputs = session.feed.step(step)
    ready = time.perf_counter()
    watchdog.at("forward and backward", step + 1)
    trainee.scheduler.step(increment=1)
    own = forward_backward(trainee, inputs.batches, inputs.counts, run.objective, session.groups, broken=inputs.broken)
    watchdog.at("update", step + 1)
    done = update(trainee, own, partial(session.pulse, ready - start))
    end = time.perf_counter()
    suspects = (not_finite(own, inputs.mine) or inputs.packs) if done.skipped else ()
    return StepDone(_metrics(step + 1, session, inputs, done, ready - start, end - start), done.pulses, suspects)


def _metrics(
    step: int, session: Session, inputs: StepInputs, done: Update, data_seconds: float, seconds: float
) -> StepMetrics:
    """Figures of a step, counted from 1."""
    run, feed, losses, saving = session.run, session.feed, done.losses, session.saver.take_times()
    peak = run.profiling.peak_tflops or peak_tflops(run.training.precision)
    speed = Speed.of(run.model, inputs.work, seconds, dist.get_world_size(), peak, run.training.freeze)
    return StepMetrics(
        step=step,
        loss=losses.total,
        ce_loss=losses.ce,
        velocity_loss=losses.velocity,
        grad_norm=done.norm,
        learning_rate=float(session.trainee.optimizer.param_groups[0]["lr"]),
        tokens_per_second=inputs.tokens / seconds,
        padded_tokens_per_second=inputs.capacity / seconds,
        tflops=speed.tflops,
        mfu=speed.mfu,
        bagel_tflops=speed.bagel_tflops,
        bagel_mfu=speed.bagel_mfu,
        fill=inputs.tokens / inputs.capacity,
        step_seconds=seconds,
        data_seconds=data_seconds,
        read_seconds=inputs.read_seconds,
        read_retries=feed.ahead.retries,
        reader_restarts=feed.ahead.restarts,
        broken=losses.broken,
        loss_by_task=losses.by_task,
        loss_by_source=losses.by_source,
        grad_norm_by_expert=done.readings.norms,
        tokens_seen=feed.tokens_seen(step),
        memory_bytes=done.readings.memory_bytes,
        skipped=done.skipped,
        save_stall_seconds=saving.stall_seconds,
        save_seconds=saving.seconds,
    )


class Skips:
    """Counts steps in a row that were left out because loss or gradients were not finite.

    Args:
        limit: of them.
        events: where they are noted.
        past: losses of the steps before; None where one was left out.
    """

    def __init__(self, limit: int, events: EventLog, past: Sequence[float | None] = ()) -> None:
        self.limit, self.events = limit, events
        self.in_a_row = next((i for i, loss in enumerate(reversed(past)) if loss is not None), len(past))

    def after(self, done: StepDone) -> None:
        """Take in a step.

        Raises:
            NonFiniteError: if it is one too many.
        """
        step, packs = done.metrics.step, ", ".join(map(str, done.suspects))
        self.in_a_row = self.in_a_row + 1 if done.metrics.skipped else 0
        if done.metrics.skipped:
            logger.warning("step %d: loss or gradients are not finite in packs %s", step, packs)
            self.events.write(step, "skipped", packs=list(done.suspects))
        if self.in_a_row >= self.limit:
            raise NonFiniteError(
                f"step {step}: {self.in_a_row} steps in a row were not finite, the last with packs {packs}; "
                "lower optimizer.lr or inspect them with tools/inspect_pack.py"
            )


def _watches(run: RunConfig, events: EventLog, past: Past) -> tuple[Skips, SpikeWatch]:
    """What looks at losses, with those of the steps before."""
    settings = run.training
    spikes = SpikeWatch(settings.spike_factor, settings.spike_steps, settings.spike_window)
    spikes.remember(loss for loss in past.losses if loss is not None)
    return Skips(settings.max_nonfinite_steps, events, past.losses), spikes


def train(session: Session, steps_done: int) -> list[StepMetrics]:
    """Run all steps that are left.

    Args:
        session: what to train with.
        steps_done: by the process before this one.

    Returns:
        the metrics of the steps of this process.

    Raises:
        NonFiniteError: after `training.max_nonfinite_steps` in a row; names the packs.
        LossSpike: if the loss stays too high.
        Stopped: if a rank was asked to stop; a checkpoint of the last step done is complete.
        StoreError: if a checkpoint cannot be written.
    """
    settings, saver, guards, history = session.run.training, session.saver, session.guards, []
    with Reporter(settings, steps_done, dist.get_rank() == 0) as reporter:
        past = reporter.past()
        skips, spikes = _watches(session.run, guards.events, past)
        if steps_done > 0:  # what an earlier process did not get to after its last step
            session.looks.after(steps_done, reporter, guards, past.looked_at)
        for step in range(steps_done, settings.train_iters):
            done = run_step(step, session)
            metrics, number = done.metrics, done.metrics.step
            history.append(metrics)
            reporter.step(metrics)
            guards.watchdog.at("end of step", number)
            asked = guards.after_step(number, done.pulses)
            saver.poll()
            skips.after(done)
            if not metrics.skipped:
                spikes.after(number, metrics.loss)
            due = settings.save_interval > 0 and number % settings.save_interval == 0
            if due or asked or number == settings.train_iters:
                guards.watchdog.at("save", number)
                saver.save(number)
            if asked and number < settings.train_iters:
                saver.finish()
                raise Stopped(
                    f"stopped by {asked.text} after step {number} of {settings.train_iters}, which is saved; go on "
                    "with training.resume=auto"
                )
            session.looks.after(number, reporter, guards)
        guards.watchdog.at("save", settings.train_iters)
        saver.finish()
    return history
