"""Our configuration in megatron-core's terms.

Station: configuration -> [TransformerConfig] -> layers, schedules, optimizer.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer import TransformerConfig

from megatron_lance.config.schema import ModelConfig, ParallelConfig

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
"""training.precision -> parameter dtype."""


def _filled_later(weight: torch.Tensor) -> torch.Tensor:
    """Leave a weight as it is.  Without initialisation megatron-core would not mark it as tensor-parallel either."""
    return weight


def transformer_config(model: ModelConfig, parallel: ParallelConfig, precision: str) -> TransformerConfig:
    """The TransformerConfig both experts, the schedules and the optimizer share.

    Weights are not initialised by megatron-core: checkpoint.hf_lance fills every parameter by its public name.

    Args:
        model: sizes.
        parallel: degrees and recompute.
        precision: a key of DTYPES.
    """
    dtype = DTYPES[precision]
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    full_recompute = parallel.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.tensor_model_parallel_size > 1,
        recompute_granularity=parallel.recompute_granularity,
        recompute_modules=list(parallel.recompute_modules),
        recompute_method="uniform" if full_recompute else None,
        recompute_num_layers=parallel.recompute_num_layers if full_recompute else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        init_method=_filled_later,
        output_layer_init_method=_filled_later,
        embedding_init_method=_filled_later,
        calculate_per_token_loss=True,
        # With two stages the neighbours on both sides are one rank, and batched sends of the interleaved schedule would
        # be matched to the wrong receives; sent one by one they are ordered.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # gloo reads a sent tensor's storage after the send returns, so it must not be freed early
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        gradient_accumulation_fusion=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )
