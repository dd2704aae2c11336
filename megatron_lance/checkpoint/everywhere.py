"""Work on files that all ranks share or must agree about.

Station: under save and load.  Whatever fails on one rank is an error of all, so no rank waits for another in vain.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_lance.checkpoint.digests import damaged
from megatron_lance.checkpoint.manifest import Checkpoint, StoreError, damage, find_checkpoint
from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import TrainingConfig

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


def of_all_ranks(own: Value) -> list[Value]:
    """A value of every rank; a collective of the world."""
    found = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def unwritable(target: Path, cause: str) -> StoreError:
    """The error of a checkpoint that could not be written."""
    return StoreError(
        f"checkpoint '{target}': cannot be written: {cause}; make room or correct training.run_dir; the checkpoints "
        "before it are as they were"
    )


def together(target: Path, action: Callable[[], Value]) -> list[Value]:
    """Do something with files on every rank; a collective of the world.

    Args:
        target: the checkpoint that an error names.
        action: may raise OSError; no collective.

    Returns:
        what each rank's action returned.

    Raises:
        StoreError: on all ranks, if the action fails on one.
    """
    values, problem = [], ""
    try:
        values = [action()]
    except OSError as error:
        problem = str(error)
    outcomes = of_all_ranks((values, problem))
    for _, cause in outcomes:
        if cause:
            raise unwritable(target, cause)
    return [found[0] for found, _ in outcomes]


def first_ranks(choose: Callable[[], Value]) -> Value:
    """What the first rank chooses, on every rank; a collective of the world.

    Ranks on other machines may see a shared disk as it was a moment ago.

    Args:
        choose: called on the first rank only.

    Raises:
        UserError: on all ranks, if it is raised there.
    """
    outcome: list[tuple[list[Value], UserError | None]] = [([], None)]
    if dist.get_rank() == 0:
        try:
            outcome = [([choose()], None)]
        except UserError as error:
            outcome = [([], error)]
    dist.broadcast_object_list(outcome, src=0)
    values, problem = outcome[0]
    if problem is not None:
        raise problem
    return values[0]


def faults(checkpoint: Checkpoint) -> list[str]:
    """Hold a checkpoint's files against their digests, each rank a share of them; a collective of the world.

    Returns:
        a sentence per damaged file, the same on every rank.
    """
    own = damaged(checkpoint.folder, dist.get_rank(), dist.get_world_size())
    return [fault for each in of_all_ranks(own) for fault in each]


def sound(checkpoint: Checkpoint, training: TrainingConfig) -> Checkpoint:
    """The checkpoint to go on from, its files held against their digests; a collective of the world.

    Args:
        checkpoint: what `find_checkpoint` chose, the same on every rank.
        training: with resume auto or latest a damaged checkpoint is passed over with a warning.

    Raises:
        StoreError: naming the damaged files, if it was asked for by name or no other is complete.
    """
    passed_over: set[Path] = set()
    while found := faults(checkpoint):
        error = damage(checkpoint, found)
        passed_over.add(checkpoint.folder)
        may_differ = training.resume in ("auto", "latest")
        other = first_ranks(lambda: find_checkpoint(training, passed_over)) if may_differ else None
        if other is None:
            raise error
        logger.warning("%s", error)
        checkpoint = other
    return checkpoint
