"""What ends a run early, sends it back, or tells an operator of trouble.

Station: beside the loop: signals and the clock, the watchdog, stragglers, loss spikes, and the log of events.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import TrainingConfig
from megatron_lance.parallel.groups import Groups
from megatron_lance.training.events import EventLog
from megatron_lance.training.pulse import Pulse, StragglerWatch, of_all_ranks
from megatron_lance.training.signals import StopReason, StopRequest
from megatron_lance.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


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

    def after_step(self, step: int, data_seconds: float, busy_seconds: float, groups: Groups) -> StopReason:
        """Exchange pulses, and name stragglers; a collective of the world.

        Args:
            step: steps done.
            data_seconds: that this rank waited for data.
            busy_seconds: of forward and backward on this rank.
            groups: degrees and ranks.

        Returns:
            what one of the ranks was asked; the same on all.
        """
        own = Pulse(self.stop.reason, groups.dp_rank, data_seconds, busy_seconds)
        pulses = of_all_ranks(own, groups.device)
        slow = self.stragglers.after(pulses)
        if slow:
            hosts = [""] * dist.get_world_size()
            dist.all_gather_object(hosts, socket.gethostname())
            for straggler in slow:
                names = sorted({hosts[rank] for rank in straggler.ranks})
                logger.warning("straggler after step %d: %s, on %s", step, straggler.line(), ", ".join(names))
                self.events.write(step, "straggler", replica=straggler.replica, factor=straggler.factor, hosts=names)
        return max(pulse.stop for pulse in pulses)


@contextmanager
def guarded(settings: TrainingConfig) -> Iterator[Guards]:
    """Guards of this process; how the run ends is its last event.

    Args:
        settings: of the run.
    """
    run_dir, rank, world_size = Path(settings.run_dir), dist.get_rank(), dist.get_world_size()
    events = EventLog(run_dir, enabled=rank == 0)
    with (
        StopRequest(settings.stop_after_minutes) as stop,
        Watchdog(run_dir, settings.hang_seconds, rank, world_size) as watchdog,
    ):
        stragglers = StragglerWatch(settings.straggler_factor, settings.straggler_interval)
        try:
            yield Guards(stop, watchdog, stragglers, events)
        except UserError as error:
            name, code = type(error).__name__, int(error.exit_code)
            events.write(watchdog.step, "ended", exit_code=code, reason=name, message=str(error))
            raise
