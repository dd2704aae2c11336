"""What is looked at between steps without changing them: losses of held-out packs, and samples.

Station: step -> [looks] -> reporter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron_lance.config.schema import RunConfig
from megatron_lance.training.guards import Guards
from megatron_lance.training.preview import Preview
from megatron_lance.training.reporter import Reporter
from megatron_lance.training.validation import Validation


class Looks:
    """Validation and previews, when they are due.

    Args:
        run: the whole configuration.
        validation: measures losses; None leaves them out.
        preview: samples prompts; None leaves them out.
    """

    def __init__(self, run: RunConfig, validation: Validation | None, preview: Preview | None) -> None:
        self.run, self.validation, self.preview = run, validation, preview

    def _is_due(self, step: int, interval: int) -> bool:
        return step % interval == 0 or step == self.run.training.train_iters

    def after(self, step: int, reporter: Reporter, guards: Guards, known: Sequence[str] = ()) -> None:
        """Look, if it is time; a collective of the world.

        Once a rank is asked to stop nothing further is begun: the run has to save before its time is up.

        Args:
            step: steps done.
            reporter: takes what is found.
            guards: told of every round, and asked whether to stop.
            known: what an earlier process has looked at.
        """
        run, at, asked = self.run, guards.watchdog.at, guards.is_asked
        if self.validation and "validation" not in known and self._is_due(step, run.validation.interval):
            reporter.validation(self.validation.measure(step, partial(at, "validation", step), asked))
        if self.preview and "preview" not in known and self._is_due(step, run.preview.interval):
            reporter.samples(self.preview.sample(step, partial(at, "preview", step), asked))
