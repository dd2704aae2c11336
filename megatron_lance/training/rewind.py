"""Going back: at a loss spike a run goes on from the checkpoint before it, without the packs that led to it.

Station: loop -> [rewind] -> store -> loop.  All ranks see the same losses, so all go back together.
"""

from __future__ import annotations

import logging
from itertools import count

from megatron_lance.checkpoint import store
from megatron_lance.checkpoint.everywhere import faults, first_ranks
from megatron_lance.checkpoint.manifest import checkpoint_before, damage
from megatron_lance.checkpoint.store import TrainingState
from megatron_lance.config.errors import NonFiniteError
from megatron_lance.data.position import gone_back
from megatron_lance.training.loop import Session, train
from megatron_lance.training.metrics import StepMetrics
from megatron_lance.training.spikes import LossSpike

logger = logging.getLogger(__name__)


def train_with_rewinds(session: Session, state: TrainingState, steps_done: int) -> list[StepMetrics]:
    """Train; at a loss spike go back to the checkpoint before it and leave out the packs in between.

    Args:
        session: what to train with.
        state: of the session's trainee.
        steps_done: by the process before this one.

    Returns:
        the metrics of the steps since the last rewind.

    Raises:
        NonFiniteError: if there is no such checkpoint, or after `training.max_rewinds`.
    """
    for rewinds in count():
        try:
            return train(session, steps_done)
        except NonFiniteError:
            session.saver.finish()
            raise
        except LossSpike as spike:
            session.saver.finish()
            steps_done = _go_back(session, state, spike, rewinds)
    raise AssertionError("unreachable")


def _go_back(session: Session, state: TrainingState, spike: LossSpike, rewinds: int) -> int:
    """Load the newest checkpoint before a spike; returns its steps done.

    Args:
        session: what is trained with.
        state: overwritten.
        spike: what happened.
        rewinds: before this one.

    Raises:
        NonFiniteError: if there is no such checkpoint, or it is one rewind too many.
    """
    settings, feed, guards = session.run.training, session.feed, session.guards
    guards.events.write(spike.last, "spike", first=spike.first, losses=spike.losses, usual=spike.usual)
    checkpoint = first_ranks(lambda: checkpoint_before(settings, spike.first))
    if checkpoint is None or rewinds == settings.max_rewinds:
        why = f"after {rewinds} rewinds" if checkpoint else "no checkpoint is older than the spike"
        raise NonFiniteError(
            f"loss spike: {spike}; {why}; lower optimizer.lr, look at the packs of these steps, save more often "
            "(training.save_interval), or raise training.spike_factor"
        ) from spike
    steps_done = checkpoint.manifest.step
    logger.warning("loss spike: %s; going back to %s", spike, checkpoint.folder)
    guards.watchdog.at("rewind", steps_done)
    if damages := faults(checkpoint):
        raise damage(checkpoint, damages) from spike
    with session.trainee.at_rest(averaged=False):  # no gather of weights is under way
        store.load(checkpoint, state)
    feed.leave_out(gone_back(feed.left_out, steps_done, spike.last))
    session.saver.save(steps_done)
    guards.events.write(steps_done, "rewound", left_out=[list(gap) for gap in feed.left_out])
    return steps_done
