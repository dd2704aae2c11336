"""Training states on disk, by megatron-core's dist_checkpointing.

Station: loop -> [save] -> run folder; run folder -> [load] -> loop.  A state is the model, the optimizer, the schedule
and the number of steps done, from which the data position follows; randomness is addressed by that position, so
training goes on bit for bit.

What loads where: model weights and averaged weights load on every layout; the optimizer's state by its kind
(optimizer_state.py), and `manifest.check_resumable` refuses the rest.  Saves are in saver.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_lance.checkpoint.flat_shards import FlatShard, sharded
from megatron_lance.checkpoint.hf_lance import check_shapes, public_shapes
from megatron_lance.checkpoint.manifest import DP_RESHARDABLE, Checkpoint, StoreError
from megatron_lance.checkpoint.optimizer_state import (
    layout_metadata,
    load_optimizer,
    sharded_optimizer,
    start_optimizer,
)
from megatron_lance.checkpoint.tensors import EMA_PREFIX
from megatron_lance.config.loader import from_dict
from megatron_lance.config.schema import ModelConfig
from megatron_lance.model.lance_model import LanceModel


@dataclass(frozen=True)
class TrainingState:
    """What a rank saves and loads.

    Attributes:
        chunks: the model chunks of this pipeline rank, wrapped for data parallelism.
        optimizer: over all chunks.
        scheduler: of the learning rate.
        ema: averaged weights, this rank's share; empty without.
    """

    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    ema: Sequence[FlatShard]


class PendingWeights:
    """A weight source of zeros, for a model that a checkpoint fills next."""

    def get(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Zeros, float32 `shape`."""
        return torch.zeros(shape)


@torch.no_grad()
def load(checkpoint: Checkpoint, state: TrainingState) -> None:
    """Fill a rank's training state, freshly built or trained; a collective of the world.

    Learning rate and the like are the run's own, whatever the checkpoint was trained with.  What modules remember
    beside their weights (scaling factors of FP8) is loaded where the checkpoint has it, and otherwise begins afresh.

    Args:
        checkpoint: one that `check_resumable` has let pass.
        state: overwritten.

    Raises:
        StoreError: if it holds another model.
    """
    tree = state_tree(state, checkpoint.manifest.optimizer, is_loading=True, with_ema=checkpoint.manifest.has_ema)
    returned = dist_checkpointing.load(tree, str(checkpoint.folder), strict=StrictHandling.RETURN_UNEXPECTED)
    loaded, _, lacking = returned  # the keys that were asked for and are not there
    if lacking := {key for key in lacking if "_extra_state" not in key}:
        raise StoreError(f"checkpoint '{checkpoint.folder}': holds another model, without {', '.join(sorted(lacking))}")
    for name, chunk in _named(state.chunks):
        _fill(chunk.module, loaded[name], checkpoint)
    load_optimizer(state.optimizer, loaded["optimizer"])
    state.scheduler.step(increment=loaded["scheduler"]["num_steps"] - state.scheduler.num_steps)


def check_model(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Refuse the weights of a model of other sizes; variants that have no weights may differ.

    Raises:
        CheckpointError: listing everything that does not fit.
    """
    stored = from_dict(checkpoint.manifest.config, f"checkpoint '{checkpoint.folder}'").model
    check_shapes(public_shapes(stored), model, f"checkpoint '{checkpoint.folder}'")


@torch.no_grad()
def load_model(checkpoint: Checkpoint, stages: Sequence[LanceModel]) -> None:
    """Fill only the model, on any layout; a collective of the world.

    Args:
        checkpoint: of a model of the same sizes, in any precision.
        stages: the model chunks of this pipeline rank, not wrapped.

    Raises:
        StoreError: if it holds another model.
    """
    tree = {
        name: _weights(stage.sharded_state_dict(metadata=layout_metadata(DP_RESHARDABLE)))
        for name, stage in _named(stages)
    }
    loaded = dist_checkpointing.load(tree, str(checkpoint.folder))
    for name, stage in _named(stages):
        _fill(stage, loaded[name], checkpoint)


def _fill(stage: LanceModel, state: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Take over the weights of a stage and what is there of the rest."""
    missing, unknown = stage.load_state_dict(state, strict=False)
    if unknown or _weights(dict.fromkeys(missing)):
        raise StoreError(f"checkpoint '{checkpoint.folder}': holds another model: {unknown}, {missing}")


def _weights(state: dict[str, Any]) -> dict[str, Any]:
    """Without what linears remember beside their weights: an imported model has none."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _named(chunks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"model{i}", chunk) for i, chunk in enumerate(chunks))


def state_tree(state: TrainingState, kind: str, is_loading: bool, with_ema: bool = True) -> dict[str, Any]:
    """What megatron-core saves of this rank, or what it is to load.

    Args:
        state: of this rank.
        kind: of the optimizer's state.
        is_loading: whether it is to be filled.
        with_ema: whether averaged weights, if there are any, are part of it.
    """
    start_optimizer(state.optimizer)
    metadata = layout_metadata(kind)
    model = {name: chunk.module.sharded_state_dict(metadata=dict(metadata)) for name, chunk in _named(state.chunks)}
    ema = {"ema": sharded(state.ema, model, EMA_PREFIX)} if with_ema and state.ema else {}
    optimizer = sharded_optimizer(state.optimizer, model, kind, is_loading)
    return {**model, **ema, "optimizer": optimizer, "scheduler": state.scheduler.state_dict()}
