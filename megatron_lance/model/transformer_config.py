"""Our configuration in megatron-core's terms.

Station: configuration -> [TransformerConfig] -> layers, schedules, optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.transformer import TransformerConfig

from megatron_lance.config.schema import Fp8Config, ModelConfig, ParallelConfig

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
"""training.precision -> parameter dtype."""


@dataclass
class DualExpertConfig(TransformerConfig):
    """megatron-core's, and what it does not know of dual-expert layers.

    Attributes:
        recompute_experts: of parallel.
        offload_layers: of parallel.
    """

    recompute_experts: tuple[str, ...] = ("und", "gen")
    offload_layers: int = 0


def _filled_later(weight: torch.Tensor) -> torch.Tensor:
    """Leave a weight as it is.  Without initialisation megatron-core would not mark it as tensor-parallel either."""
    return weight


NO_FP8 = Fp8Config()


def _fp8_fields(fp8: Fp8Config) -> dict[str, Any]:
    """FP8 in megatron-core's terms."""
    if fp8.recipe == "none":
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": fp8.amax_compute_algo,
        "first_last_layers_bf16": bool(fp8.first_layers_bf16 or fp8.last_layers_bf16),
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: str, fp8: Fp8Config = NO_FP8
) -> DualExpertConfig:
    """The TransformerConfig both experts, the schedules and the optimizer share.

    Weights are not initialised by megatron-core: checkpoint.hf_lance fills every parameter by its public name.

    Args:
        model: sizes.
        parallel: degrees, recompute and offload.
        precision: a key of DTYPES.
        fp8: of the experts' linears; without it they compute in the precision of their parameters.
    """
    dtype = DTYPES[precision]
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    full_recompute = parallel.recompute_granularity == "full"
    on_engine = model.transformer_impl == "transformer_engine"
    return DualExpertConfig(
        recompute_experts=parallel.recompute_experts,
        offload_layers=parallel.offload_layers,
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
        transformer_impl=model.transformer_impl,
        use_te_activation_func=on_engine,
        # Quantised weights are not kept for the next micro-batch: a region that was too small for FP8 in the first one
        # would use those of the step before.  Against a pack's products, quantising again is nothing.
        disable_parameter_transpose_cache=on_engine,
        **_fp8_fields(fp8),
        # TransformerEngine's linears add to a gradient buffer by themselves, megatron-core's by a module of apex
        gradient_accumulation_fusion=on_engine or find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )
