"""The optimizer's state in checkpoints: its kinds, and what megatron-core needs help with.

Station: under store.  Three kinds; which of them loads after which change of layout:

    kind               dp, cp   tp, pp, vpp, stages   written by
    dp_reshardable     yes      no                    the distributed optimizer, as it lies in each rank's buckets
    fully_reshardable  yes      yes                   the distributed optimizer, gathered to each rank's host memory
    per_parameter      yes      yes                   the optimizer that is not distributed
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer

from megatron_lance.checkpoint.manifest import DP_RESHARDABLE, FULLY_RESHARDABLE, PER_PARAMETER
from megatron_lance.config.schema import RunConfig


def kind_of_save(run: RunConfig, step: int) -> str:
    """Kind in which the optimizer's state is written after a step."""
    training = run.training
    if not run.parallel.use_distributed_optimizer:
        return PER_PARAMETER
    due = training.fully_reshardable_every > 0 and step % training.fully_reshardable_every == 0
    return FULLY_RESHARDABLE if due else training.save_format


def layout_metadata(kind: str) -> dict[str, object]:
    """What megatron-core wants to know of a state dict's layout."""
    sharding = DP_RESHARDABLE if kind == PER_PARAMETER else kind
    return {"distrib_optim_sharding_type": sharding, "chained_optim_avoid_prefix": True}


def start_optimizer(optimizer: MegatronOptimizer) -> None:
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


def sharded_optimizer(
    optimizer: MegatronOptimizer, model: dict[str, Any], kind: str, is_loading: bool
) -> dict[str, Any]:
    """An optimizer's state as megatron-core saves or loads it.

    Args:
        optimizer: one whose state was started.
        model: sharded state dict of the same model.
        kind: of the state.
        is_loading: whether it is to be filled.
    """
    state: dict[str, Any] = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=layout_metadata(kind))
    if state.get("param_state_sharding_type") == DP_RESHARDABLE:
        _clear_gaps(state["param_state"])
    return state


def _clear_gaps(buffers: dict[Any, Any]) -> None:
    """Zero what lies between parameters: megatron-core 0.16.1 writes memory there that was never set."""
    for buckets in (buckets for by_dtype in _dicts(buffers) for buckets in by_dtype.values()):
        for part in (part for bucket in buckets for part in bucket):
            if part["padding"].unwrap():
                for value in part.values():
                    if isinstance(value, ShardedTensor):
                        value.data.zero_()


def _dicts(buffers: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
    return (value for value in buffers.values() if isinstance(value, dict))


def load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Fill an optimizer; learning rate and the like stay its own.

    Args:
        optimizer: one whose state was started.
        loaded: what megatron-core read for it.
    """
    fully = loaded.get("param_state_sharding_type") == FULLY_RESHARDABLE
    moments = loaded.pop("param_state") if fully else None
    with _own_settings(optimizer):
        optimizer.load_state_dict(loaded)
    if moments is not None:  # megatron-core 0.16.1 looks in vain for the update count of torch's Adam among them
        (part,) = optimizer.chained_optimizers
        for state in part.optimizer.state.values():
            state.pop("step", None)
        part.load_parameter_state_from_fully_reshardable(moments)
    _restore_steps(optimizer)


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
                if isinstance(part.optimizer, torch.optim.Adam) and "step" in group:
                    state["step"] = torch.tensor(float(group["step"]), dtype=torch.float32)
    _count_from_zero(optimizer)
