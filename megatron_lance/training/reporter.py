"""Says how a run goes: to its folder, and by log lines or a progress bar.

Station: step, validation, preview -> [reporter] -> metrics, log, terminal.  Only the first rank says anything.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_lance.config.schema import TrainingConfig
from megatron_lance.training.metrics import MetricsWriter, StepMetrics
from megatron_lance.training.preview import Samples
from megatron_lance.training.validation import ValidationMetrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Past:
    """What is known of the steps before this process, or before a rewind; the same on every rank.

    Attributes:
        looked_at: which of validation and preview have figures of the last step.
        losses: of the last steps, as many as anything looks back; those of steps that were left out are None.
    """

    looked_at: tuple[str, ...] = ()
    losses: tuple[float | None, ...] = ()


class Reporter:
    """Reports steps, validations and samples while it is entered.

    A progress bar needs a terminal; where there is none, lines are written.

    Args:
        settings: of the run.
        steps_done: before this process.
        enabled: False on all ranks but the first.
    """

    def __init__(self, settings: TrainingConfig, steps_done: int, enabled: bool) -> None:
        self.settings, self.steps_done, self.enabled = settings, steps_done, enabled
        self.bar_wanted = enabled and settings.progress and sys.stderr.isatty()

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

    def past(self) -> Past:
        """What the run's folder says of the steps that are done; a collective of the world."""
        if self.steps_done == 0:
            return Past()
        found = [Past()]
        if self.enabled:
            losses = self.writer.losses(max(self.settings.spike_window, self.settings.max_nonfinite_steps))
            found = [Past(tuple(self.writer.known(self.steps_done)), tuple(losses))]
        dist.broadcast_object_list(found, src=0)
        return found[0]

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
