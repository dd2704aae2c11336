"""Which checkpoints stay.

Station: publication -> [retention].
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_lance.checkpoint.manifest import step_folder, steps_in
from megatron_lance.config.schema import TrainingConfig

logger = logging.getLogger(__name__)


def expired(steps: Sequence[int], step: int, keep_last: int, keep_every: int) -> list[int]:
    """Steps whose checkpoints may go after the save of a step.

    Args:
        steps: of all checkpoints, ascending.
        step: just saved; later steps are of another branch and stay.
        keep_last: newest ones that stay; 0: all.
        keep_every: steps; its multiples stay too; 0: none.
    """
    old = [s for s in steps if s <= step][:-keep_last] if keep_last else []
    return [s for s in old if not keep_every or s % keep_every]


def remove_old(root: Path, step: int, training: TrainingConfig) -> None:
    """Remove what killed saves left, and checkpoints that need not be kept.

    What cannot be removed, because a killed run's writer still writes there, is named and goes with a later save.
    """
    leftovers = list(root.glob(".step_*"))
    old = expired(steps_in(root), step, training.keep_last, training.keep_every)
    for folder in leftovers + [step_folder(root, s) for s in old]:
        try:
            shutil.rmtree(folder)
            logger.info("removed %s", folder)
        except OSError as error:
            logger.warning("%s could not be removed: %s", folder, error)
