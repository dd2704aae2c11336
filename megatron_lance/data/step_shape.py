"""Step shape: what a configuration asks of the packs of a step.

Station: configuration -> [step shape] -> step packer.  In: the data and model sections and the global batch size.  Out:
the two budgets of packing, tokens and cost.
"""

from __future__ import annotations

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import DataConfig, ModelConfig
from megatron_lance.packing.step_packer import StepShape


def token_cost(model: ModelConfig) -> float:
    """Linear FLOPs of a token over attention FLOPs of an allowed (query, key) pair; the same for every layer.

    A token passes QKV, output projection and SwiGLU of one expert, a pair costs two products of kv_channels per head.
    """
    heads = model.num_attention_heads * model.kv_channels
    qkv = model.hidden_size * (heads + 2 * model.num_query_groups * model.kv_channels)
    weights = qkv + heads * model.hidden_size + 3 * model.hidden_size * model.ffn_hidden_size
    return weights / (2 * heads)


def step_shape(config: DataConfig, model: ModelConfig, global_batch_size: int) -> StepShape:
    """The shape of a run's steps.

    Args:
        config: capacity, what packs are balanced for.
        model: sizes that cost depends on.
        global_batch_size: packs of a step.

    Raises:
        UserError: if the packs of a step cannot be dealt evenly.
    """
    replicas = config.balance_replicas
    if replicas is None:
        replicas = global_batch_size if global_batch_size % 2 else global_batch_size // 2
    if replicas < 1 or global_batch_size % replicas:
        raise UserError(
            f"data.balance_replicas {replicas}: must divide training.global_batch_size {global_batch_size}; set the "
            "data-parallel size of the run, or null"
        )
    window, bands = config.planning_window, config.length_bands
    return StepShape(config.seq_length, global_batch_size, replicas, token_cost(model), window, bands)
