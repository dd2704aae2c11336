"""Losses of held-out packs during training.

Station: step -> [forward passes over the first packs of a validation index] -> metrics.  Noise and timesteps are
functions of (seed, sample), so figures of different steps, layouts and restarts are of the same rows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lance.config.schema import RunConfig
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.objectives.losses import TASKS, LossCounts, sums_by_source, sums_by_task
from megatron_lance.parallel.dispatch import RankBatch
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
        broken: visual segments of them that could not be read; the means are of the other samples.
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
        broken = f", {self.broken} pictures or clips could not be read" if self.broken else ""
        return (
            f"validation after step {self.step}: loss {self.loss:.5f} ce {self.ce_loss:.4f} velocity "
            f"{self.velocity_loss:.4f} ({tasks}) over {self.packs} packs in {self.seconds:.1f} s{broken}"
        )


def is_time_up(start: float, max_seconds: float, asked: bool, groups: Groups) -> bool:
    """Whether any rank has been at it for `max_seconds` or is asked to stop; a collective, so all ranks decide alike.

    Args:
        start: by this rank's time.perf_counter.
        max_seconds: the limit.
        asked: whether this rank is asked to stop.
        groups: for the device.
    """
    longest = torch.tensor(math.inf if asked else time.perf_counter() - start, device=groups.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest) >= max_seconds


def rows_read(batches: Sequence[RankBatch], planned: LossCounts, groups: Groups) -> LossCounts:
    """The loss rows of samples whose media could be read; a collective of the world.

    Training divides by the planned rows, which it knows beforehand; here a mean would be too small by the others.

    Args:
        batches: of this rank.
        planned: loss rows of the batches of all replicas.
        groups: degrees and ranks.
    """
    sources = len(planned.by_source)
    rows = torch.zeros(2, 1 + len(TASKS) + sources, dtype=torch.float64, device=groups.device)
    for b in batches if groups.pp_rank == 0 else ():
        ce, velocity = (
            (b.ce_weights, b.ce_tasks, b.ce_sources),
            (b.velocity_weights, b.velocity_tasks, b.velocity_sources),
        )
        for kind, (weights, tasks, origins) in enumerate((ce, velocity)):
            if kind == 1 or groups.tp_rank == 0:  # CE rows are the same on all tp ranks; count them once
                one = torch.ones_like(weights)
                per_task, per_source = sums_by_task(one, weights, tasks), sums_by_source(one, weights, origins, sources)
                rows[kind] += torch.cat([weights.sum()[None], per_task, per_source])
    dist.all_reduce(rows)
    ce_rows, velocity_rows = (int(row) for row in rows[:, 0])
    of_parts = [int(row) for row in rows[:, 1:].sum(0)]  # a task, or source, has rows of one kind
    by_source = dict(zip(planned.by_source, of_parts[len(TASKS) :], strict=True))
    return LossCounts(ce_rows, velocity_rows, tuple(of_parts[: len(TASKS)]), by_source)


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

    def measure(self, step: int, beat: Callable[[], None], asked: Callable[[], bool]) -> ValidationMetrics:
        """Go through the packs, one or, on several pipeline stages, a few on each replica at a time.

        A collective of the world.

        Args:
            step: steps done.
            beat: called before each round.
            asked: whether this rank is asked to stop; nothing further is begun then.
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
                if is_time_up(start, settings.max_seconds, asked(), self.groups):
                    break
        if done < self.packs and dist.get_rank() == 0:
            logger.warning(
                "validation: ended by validation.max_seconds %s or a stop after %d of %d packs",
                *(settings.max_seconds, done, self.packs),
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
        """Loss rows of some packs, and sums over them; the last pack again, without loss, fills up a round."""
        idle = at_once - len(numbers)
        planned = [self.index.pack(number) for number in (*numbers, *[numbers[-1]] * idle)]
        inputs = self.feed.of_packs(planned, self.reader, idle)
        sums = forward(
            self.trainee, inputs.batches, inputs.counts, self.run.objective, self.groups, broken=inputs.broken
        )
        return rows_read(inputs.batches, inputs.counts, self.groups), sums
