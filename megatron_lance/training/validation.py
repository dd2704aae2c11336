"""Losses of held-out packs during training.

Station: step -> [forward passes over the first packs of a validation index] -> metrics.  Noise and timesteps are
functions of (seed, sample), so figures of different steps, layouts and restarts are of the same rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lance.config.schema import RunConfig
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.objectives.losses import TASKS, LossCounts
from megatron_lance.parallel.groups import Groups
from megatron_lance.training.feed import Feed
from megatron_lance.training.setup import Trainee
from megatron_lance.training.step import LossSums, StepLosses, forward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationMetrics:
    """Losses over the loss rows of the packs that were gone through; but for the time the same on every rank.

    Attributes:
        step: steps done before it.
        loss: weighted total.
        ce_loss: nats per CE row.
        velocity_loss: per velocity row.
        loss_by_task: mean over the loss rows of each task there is: CE of understanding, velocity of generation.
        loss_by_source: the same of each data source.
        packs: gone through; fewer than asked for where the time was up.
        broken: visual segments of them that could not be read.
        averaged: whether the weights were the averaged ones.
        seconds: that training stood still for it.
    """

    step: int
    loss: float
    ce_loss: float
    velocity_loss: float
    loss_by_task: dict[str, float]
    loss_by_source: dict[str, float]
    packs: int
    broken: int
    averaged: bool
    seconds: float

    def line(self) -> str:
        """The figures as one line."""
        tasks = ", ".join(f"{task} {loss:.4f}" for task, loss in self.loss_by_task.items())
        return (
            f"validation after step {self.step}: loss {self.loss:.5f} ce {self.ce_loss:.4f} velocity "
            f"{self.velocity_loss:.4f} ({tasks}) over {self.packs} packs in {self.seconds:.1f} s"
        )


def is_time_up(start: float, max_seconds: float, groups: Groups) -> bool:
    """Whether any rank has been at it for `max_seconds`; a collective of the world, so all ranks decide alike.

    Args:
        start: by this rank's time.perf_counter.
        max_seconds: the limit.
        groups: for the device.
    """
    longest = torch.tensor(time.perf_counter() - start, device=groups.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest) >= max_seconds


class Validation:
    """Measures losses on held-out packs.

    Args:
        run: the whole configuration; `validation.pack_index` is set.
        trainee: the model.
        feed: of training; its encoders serve here too.
        groups: degrees and ranks.
        tokenizer: of the run.

    Raises:
        PackIndexError: if the index is missing, was made for another configuration, or holds training's rows.
    """

    def __init__(self, run: RunConfig, trainee: Trainee, feed: Feed, groups: Groups, tokenizer: Tokenizer) -> None:
        self.run, self.trainee, self.feed, self.groups = run, trainee, feed, groups
        self.index = PackIndex.open(run.validation.pack_index, for_validation=True)
        self.reader = PackReader(run.data, self.index, tokenizer, run.training.seed, run.model)
        self.packs = min(run.validation.packs, len(self.index))

    def measure(self, step: int, beat: Callable[[], None]) -> ValidationMetrics:
        """Go through the packs, one or, on several pipeline stages, a few on each replica at a time.

        A collective of the world.

        Args:
            step: steps done.
            beat: called before each round.
        """
        start = time.perf_counter()
        settings, at_once = self.run.validation, self.groups.dp * self.groups.pp
        rows, sums, done = LossCounts.of([]), LossSums(0.0, 0.0, (0.0,) * len(TASKS), 0), 0
        with self.trainee.at_rest(averaged=settings.ema):
            while done < self.packs:
                beat()
                numbers = range(done, min(done + at_once, self.packs))
                counts, found = self._forward(numbers, at_once)
                rows, sums, done = rows.plus(counts), sums.plus(found), numbers.stop
                if is_time_up(start, settings.max_seconds, self.groups):
                    break
        if done < self.packs and dist.get_rank() == 0:
            logger.warning(
                "validation.max_seconds %s: over after %d of %d packs", settings.max_seconds, done, self.packs
            )
        losses = StepLosses.of(sums, rows, self.run.objective)
        return ValidationMetrics(
            step=step,
            loss=losses.total,
            ce_loss=losses.ce,
            velocity_loss=losses.velocity,
            loss_by_task=losses.by_task,
            loss_by_source=losses.by_source,
            packs=done,
            broken=losses.broken,
            averaged=settings.ema,
            seconds=time.perf_counter() - start,
        )

    def _forward(self, numbers: range, at_once: int) -> tuple[LossCounts, LossSums]:
        """Loss rows of some packs and the sums over them; the last pack again, without loss, fills up a round."""
        idle = at_once - len(numbers)
        planned = [self.index.pack(number) for number in (*numbers, *[numbers[-1]] * idle)]
        inputs = self.feed.of_packs(planned, self.reader, idle)
        sums = forward(
            self.trainee, inputs.batches, inputs.counts, self.run.objective, self.groups, broken=inputs.broken
        )
        return inputs.counts, sums
