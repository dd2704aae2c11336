"""Which classes a dual-expert layer is built from.

Station: configuration -> [layer spec] -> TransformerBlock.  The local spec uses megatron-core's own parallel linears,
MLP, self-attention projections and bias-dropout-add; only the norm is ours, because megatron-core's torch norm refuses
sequence parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from megatron_lance.model.dual_expert_layer import DualExpertLayer, DualExpertLayerSubmodules


class NormWeight(nn.Module):
    """The weight of an RMSNorm, replicated over sequence-parallel ranks.

    Args:
        config: supplies dtype and sequence parallelism.
        hidden_size: channels normalised together.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=device()))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNorm(NormWeight):
    """RMSNorm over the last dimension, computed in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return normed.to(x.dtype) * self.weight


class HeadNorm(NormWeight):
    """Owns the norm weight of all query or all key heads; ops/qk_norm_mape.py applies it together with the rotation.

    Calling hands the weight out: what waits for a module's parameters before its forward (megatron-core's overlapped
    parameter gather) waits here too.
    """

    def forward(self) -> torch.Tensor:
        """The weight, [hn]."""
        return self.weight


class NoCoreAttention(nn.Module):
    """Stands where SelfAttention builds its own core attention; the dual-expert layer attends jointly instead."""

    def __init__(self, **unused: object) -> None:
        super().__init__()


def device() -> torch.device:
    """Where this process keeps its parameters: its GPU, or the CPU if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def local_expert_layer(qk_norm: bool) -> ModuleSpec:
    """One expert's layer: a plain megatron-core TransformerLayer.

    Args:
        qk_norm: norm q and k per head.
    """
    qk_layernorm = HeadNorm if qk_norm else None
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=NoCoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_layernorm,
                    k_layernorm=qk_layernorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_submodules(
    num_layers: int, attention_backend: str, mape_backend: str, mrope_section: tuple[int, ...], qk_norm: bool
) -> TransformerBlockSubmodules:
    """Submodules of a TransformerBlock of `num_layers` dual-expert layers without a final norm.

    Args:
        num_layers: layers on this pipeline stage (and virtual stage).
        attention_backend: of ops.attention.
        mape_backend: of ops.qk_norm_mape.
        mrope_section: frequencies per axis.
        qk_norm: norm q and k per head.
    """
    params = {"attention_backend": attention_backend, "mape_backend": mape_backend, "mrope_section": mrope_section}
    layer = ModuleSpec(
        module=DualExpertLayer,
        params=params,
        submodules=DualExpertLayerSubmodules(und=local_expert_layer(qk_norm), gen=local_expert_layer(qk_norm)),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers)
