"""Whole gradients and weights, for checks.

Station: a step's backward or update -> [tensors by public key] -> comparison with the reference or another layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_lance.checkpoint.hf_lance import gather_public, global_parameters
from megatron_lance.config.schema import ModelConfig
from megatron_lance.training.setup import Trainee

Public = dict[str, torch.Tensor]


def public_gradients(trainee: Trainee, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Gradients of all trained parameters by public key, from all stages; a collective of the whole world.

    Args:
        trainee: after a backward pass; its optimizer must not be distributed, which keeps only shards of them.
        model: sizes.

    Returns:
        float32 tensors on the CPU, on every rank.
    """
    trained = ((name, p) for name, p in global_parameters(trainee.stages) if p.requires_grad)
    return _public(((name, p.main_grad) for name, p in trained), model)  # type: ignore[attr-defined]


def public_weights(trainee: Trainee, model: ModelConfig) -> dict[str, torch.Tensor]:
    """All weights by public key, from all stages; a collective of the whole world.

    Args:
        trainee: after an update, whatever its optimizer; overlapped gathers of parameters are awaited.
        model: sizes.

    Returns:
        float32 tensors on the CPU, on every rank.
    """
    for chunk in trainee.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return _public(((name, p.detach()) for name, p in global_parameters(trainee.stages)), model)


def _public(own: Iterator[tuple[str, torch.Tensor]], model: ModelConfig) -> Public:
    group = parallel_state.get_tensor_model_parallel_group()
    public = {key: value.float().cpu() for key, value in gather_public(own, model, group)}
    stages: list[Public | None] = [None] * dist.get_world_size()
    dist.all_gather_object(stages, public)
    return {key: value for stage in stages if stage is not None for key, value in stage.items()}
