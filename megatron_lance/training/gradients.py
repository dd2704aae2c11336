"""Whole gradients, for checks.

Station: a step's backward -> [gradients by public key] -> comparison with the reference or another layout.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_lance.checkpoint.hf_lance import gather_public, global_parameters
from megatron_lance.config.schema import ModelConfig
from megatron_lance.training.setup import Trainee


def public_gradients(trainee: Trainee, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Gradients of all parameters by public key, from all stages; a collective of the whole world.

    Args:
        trainee: after a backward pass; its optimizer must not be distributed, which keeps only shards of them.
        model: sizes.

    Returns:
        float32 tensors on the CPU, on every rank.
    """
    parameters = global_parameters(trainee.stages)
    own = ((name, parameter.main_grad) for name, parameter in parameters)  # type: ignore[attr-defined]
    group = parallel_state.get_tensor_model_parallel_group()
    public = {key: grad.float().cpu() for key, grad in gather_public(own, model, group)}
    stages: list[dict[str, torch.Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(stages, public)
    return {key: grad for stage in stages if stage is not None for key, grad in stage.items()}
