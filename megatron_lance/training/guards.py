"""What ends a run early, sends it back, or tells an operator of trouble.

Station: beside the loop: signals and the clock, the watchdog, stragglers, loss spikes, and the log of events.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megatron_lance.checkpoint.everywhere import of_all_ranks
from megatron_lance.config.errors import ExitCode, UserError
from megatron_lance.config.schema import TrainingConfig
from megatron_lance.training.events import EventLog
from megatron_lance.training.pulse import Pulse, StragglerWatch
from megatron_lance.training.signals import StopReason, StopRequest
from megatron_lance.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

_DEFECT = 1  # the exit code of an error that is not the user's


@dataclass(frozen=True)
class Guards:
    """Of one process.

    Attributes:
        stop: what it was asked.
        watchdog: knows where it stands.
        stragglers: compares replicas.
        events: written by the first rank.
    """

    stop: StopRequest
    watchdog: Watchdog
    stragglers: StragglerWatch
    events: EventLog

    def is_asked(self) -> bool:
        """Whether this rank is asked to stop; others may not be."""
        return bool(self.stop.reason)

    def after_step(self, step: int, pulses: Sequence[Pulse]) -> StopReason:
        """Name stragglers, and say what one of the ranks was asked; a collective of the world.

        Args:
            step: steps done.
            pulses: of all ranks, by rank.
        """
        slow = self.stragglers.after(pulses)
        if slow:
            hosts = of_all_ranks(socket.gethostname())
            for straggler in slow:
                names = sorted({hosts[rank] for rank in straggler.ranks})
                logger.warning("straggler after step %d: %s, on %s", step, straggler.line(), ", ".join(names))
                self.events.write(step, "straggler", replica=straggler.replica, factor=straggler.factor, hosts=names)
        return max(pulse.stop for pulse in pulses)


@dataclass(frozen=True)
class _Ending:
    """Makes how a run ends its last event.

    Attributes:
        events: takes it.
        watchdog: knows the step.
    """

    events: EventLog
    watchdog: Watchdog

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code: int = ExitCode.FINISHED if kind is None else _DEFECT
        if isinstance(error, UserError):
            code = error.exit_code
        message = {} if error is None else {"message": str(error)}
        reason = "finished" if kind is None else kind.__name__
        self.events.write(self.watchdog.step, "ended", exit_code=int(code), reason=reason, **message)


@contextmanager
def guarded(settings: TrainingConfig, stop: StopRequest, events: EventLog) -> Iterator[Guards]:
    """Guards of this process; how the run ends is its last event.

    Args:
        settings: of the run.
        stop: what this process is asked, since its begin.
        events: of the run.
    """
    run_dir, rank = Path(settings.run_dir), dist.get_rank()
    stragglers = StragglerWatch(settings.straggler_factor, settings.straggler_interval)
    with (
        Watchdog(run_dir, settings.hang_seconds, rank, dist.get_world_size()) as watchdog,
        _Ending(events, watchdog),
    ):
        yield Guards(stop, watchdog, stragglers, events)
