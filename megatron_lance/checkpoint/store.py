"""Training states on disk, by megatron-core's dist_checkpointing.

Station: loop -> [save] -> run folder; run folder -> [load] -> loop.  A state is the model, the optimizer, the schedule
and the number of steps done, from which the data position follows; randomness is addressed by that position, so
training goes on bit for bit.

What loads where: model weights load on every layout.  The state of the distributed optimizer is written as it lies in
each rank's buckets (`dp_reshardable`: nothing is gathered), so it loads under the same tensor and pipeline layout and
any dp and cp sizes; `manifest.check_resumable` refuses the rest.

A save writes into a temporary folder beside the target; when all ranks are done, one rank adds the manifest, renames
the folder and points `latest` to it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_lance.checkpoint.files import partial_folder, publish, write_text
from megatron_lance.checkpoint.manifest import (
    LATEST_FILE,
    BrokenMedia,
    Checkpoint,
    DataIdentity,
    Manifest,
    StoreError,
    checkpoints_folder,
    step_folder,
    steps_in,
)
from megatron_lance.config.schema import RunConfig
from megatron_lance.model.lance_model import LanceModel

logger = logging.getLogger(__name__)

_METADATA = {"distrib_optim_sharding_type": "dp_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class TrainingState:
    """What a rank saves and loads.

    Attributes:
        chunks: the model chunks of this pipeline rank, wrapped for data parallelism.
        optimizer: over all chunks.
        scheduler: of the learning rate.
    """

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


class PendingWeights:
    """A weight source of zeros, for a model that a checkpoint fills next."""

    def get(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Zeros, float32 `shape`."""
        return torch.zeros(shape)


def save(run: RunConfig, step: int, state: TrainingState, data: DataIdentity, broken: BrokenMedia) -> Path:
    """Write the checkpoint of a step; a collective of the world.

    Args:
        run: the resolved configuration.
        step: steps done.
        state: of this rank.
        data: what the data position refers to.
        broken: media this rank knows to be broken; those of all ranks are saved.

    Returns:
        the checkpoint's folder.

    Raises:
        StoreError: if the folder cannot be written.
    """
    root = checkpoints_folder(run.training)
    target = step_folder(root, step)
    known = _of_all_ranks(broken)
    partial = [""]
    if dist.get_rank() == 0:
        try:
            partial[0] = str(partial_folder(target))
        except OSError as error:
            raise StoreError(f"training.run_dir '{run.training.run_dir}': cannot be written: {error}") from error
    dist.broadcast_object_list(partial)
    if run.parallel.overlap_param_gather:
        for chunk in state.chunks:
            chunk.start_param_sync(force_sync=True)
    dist_checkpointing.save(_tree(state, is_loading=False), partial[0])
    dist.barrier()
    if dist.get_rank() == 0:
        manifest = Manifest.of(Path(partial[0]), run, step, dist.get_world_size(), data, known)
        manifest.write(Path(partial[0]))
        publish(Path(partial[0]), target)
        write_text(root / LATEST_FILE, target.name + "\n")
        _remove_old(root, step, run.training.keep_checkpoints)
        logger.info("saved %s", target)
    dist.barrier()
    return target


@torch.no_grad()
def load(checkpoint: Checkpoint, state: TrainingState) -> None:
    """Fill a rank's freshly built training state; a collective of the world.

    Learning rate and the like are the run's own, whatever the checkpoint was trained with.

    Args:
        checkpoint: one that `check_resumable` has let pass.
        state: overwritten.
    """
    loaded = dist_checkpointing.load(_tree(state, is_loading=True), str(checkpoint.folder))
    for name, chunk in _named(state.chunks):
        chunk.module.load_state_dict(loaded[name])
    with _own_settings(state.optimizer):
        state.optimizer.load_state_dict(loaded["optimizer"])
    _restore_steps(state.optimizer)
    state.scheduler.step(increment=loaded["scheduler"]["num_steps"])


@torch.no_grad()
def load_model(checkpoint: Checkpoint, stages: Sequence[LanceModel]) -> None:
    """Fill only the model, on any layout; a collective of the world.

    Args:
        checkpoint: of a model of the same sizes.
        stages: the model chunks of this pipeline rank, not wrapped.
    """
    tree = {name: stage.sharded_state_dict(metadata=dict(_METADATA)) for name, stage in _named(stages)}
    loaded = dist_checkpointing.load(tree, str(checkpoint.folder))
    for name, stage in _named(stages):
        stage.load_state_dict(loaded[name])


def _named(chunks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"model{i}", chunk) for i, chunk in enumerate(chunks))


def _tree(state: TrainingState, is_loading: bool) -> dict[str, Any]:
    """What megatron-core saves of this rank, or what it is to load."""
    _start_optimizer(state.optimizer)
    model = {name: chunk.module.sharded_state_dict(metadata=dict(_METADATA)) for name, chunk in _named(state.chunks)}
    optimizer = state.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(_METADATA))
    return {**model, "optimizer": optimizer, "scheduler": state.scheduler.state_dict()}


def _of_all_ranks(broken: BrokenMedia) -> dict[tuple[str, str, int, str], str]:
    """What any rank knows to be broken."""
    found: list[BrokenMedia] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, dict(broken))
    return {key: cause for each in found for key, cause in each.items()}


def _remove_old(root: Path, step: int, keep: int) -> None:
    """Remove what killed saves left, and checkpoints before the `keep` newest up to `step`.

    0 keeps all; checkpoints of later steps are of another branch and stay.
    """
    leftovers = list(root.glob(".step_*"))
    old = [step_folder(root, s) for s in steps_in(root) if s <= step][:-keep] if keep else []
    for folder in leftovers + old:
        shutil.rmtree(folder)
        logger.info("removed %s", folder)


def _start_optimizer(optimizer: MegatronOptimizer) -> None:
    """Give every parameter optimizer state before the first update, which megatron-core needs to save and to load."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    _count_from_zero(optimizer)


def _count_from_zero(optimizer: MegatronOptimizer) -> None:
    """Torch's Adam counts updates per parameter; TransformerEngine's does per group and needs nothing."""
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.zeros((), dtype=torch.float32))


@contextmanager
def _own_settings(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Keep learning rate, weight decay, betas and the like while a state is loaded."""
    own = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _restore_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own update count again.

    megatron-core 0.16.1 saves the distributed optimizer's count per group; with torch's Adam it then loads one tensor
    shared by all parameters and overwrites it with the count from before the load.
    """
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if "step" in state and "step" in group:
                    state["step"] = torch.tensor(float(group["step"]), dtype=torch.float32)
    _count_from_zero(optimizer)
