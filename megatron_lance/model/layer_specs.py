"""Which classes a dual-expert layer is built from.

Station: configuration -> [layer spec] -> TransformerBlock.  Both specs use megatron-core's self-attention projections,
MLP and bias-dropout-add.  The local one has megatron-core's own parallel linears, and a norm of ours, because
megatron-core's torch norm refuses sequence parallelism.  The other one has TransformerEngine's linears, norms and
SwiGLU by megatron-core's wrappers.  Norms stay modules of their own there too: what is fused into a linear would have
other names in checkpoints, and could not be recomputed by itself.  So parameters have the same names, shapes and order
in both, and the checkpoints of one load in the other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

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

from megatron_lance.config.errors import UserError
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


class SwiGLU(nn.Module):
    """TransformerEngine's SwiGLU, silu(gate) * up, which keeps nothing but its input for backward.

    It is no submodule, because megatron-core's MLP asks all of its submodules for a sharded state dict.

    Args:
        config: megatron-core's.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        from megatron.core.extensions.transformer_engine import TEActivationOp

        self._op = [TEActivationOp(config)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., gate | up] -> [..., ffn]."""
        out: torch.Tensor = self._op[0](x)
        return out

    def sharded_state_dict(self, *unused: object) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Parts:
    """What an expert's layer is made of; all classes have megatron-core's signatures.

    Attributes:
        norm: RMSNorm of hidden states.
        column: linear whose output is split over tensor-parallel ranks.
        row: linear whose input is.
        activation: between them; None: what the configuration names.
        without_fp8: a context in which linears compute in bf16; None where none computes in FP8, or where delayed
            scaling does: its greatest values are reduced over replicas, whose packs differ, so that what takes part
            must not depend on the pack.
    """

    norm: type
    column: type
    row: type
    activation: type | None = None
    without_fp8: Callable[[], AbstractContextManager[None]] | None = None


LOCAL = Parts(RMSNorm, ColumnParallelLinear, RowParallelLinear)


def parts_of(config: TransformerConfig) -> Parts:
    """The parts that `config.transformer_impl` names.

    Raises:
        UserError: if they are TransformerEngine's and it cannot be imported, or there is no GPU.
    """
    if config.transformer_impl == "local":
        return LOCAL
    check_transformer_engine(config.fp8_recipe if config.fp8 else "none")
    import transformer_engine.pytorch as te
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    provider = TESpecProvider()
    switched = bool(config.fp8) and config.fp8_recipe != "delayed"
    return Parts(
        norm=provider.layer_norm(rms_norm=True),
        column=provider.column_parallel_linear(),
        row=provider.row_parallel_linear(),
        activation=SwiGLU,
        without_fp8=partial(te.autocast, enabled=False) if switched else None,
    )


def check_transformer_engine(recipe: str = "none") -> None:
    """Say why TransformerEngine cannot serve, if it cannot.

    Args:
        recipe: of FP8 that is wanted.

    Raises:
        UserError: if it cannot be imported, there is no GPU, or the GPU does not know the recipe.
    """
    problem = "" if torch.cuda.is_available() else "there is no GPU"
    try:
        import transformer_engine.pytorch as te
    except (ImportError, OSError) as error:  # OSError: its libraries do not load
        problem = f"it cannot be imported ({error})"
    if problem:
        raise UserError(
            f"model.transformer_impl = transformer_engine: needs TransformerEngine on a GPU, but {problem}; install "
            "megatron-lance[te] on a machine with a GPU, or set model.transformer_impl=local"
        )
    if recipe == "none":
        return
    checks = {"blockwise": te.is_fp8_block_scaling_available, "mxfp8": te.is_mxfp8_available}
    served, reason = checks.get(recipe, te.is_fp8_available)(return_reason=True)
    if not served:
        raise UserError(f"fp8.recipe = {recipe}: this GPU or CUDA does not serve it ({reason}); set another, or none")


def expert_layer(parts: Parts, qk_norm: bool) -> ModuleSpec:
    """One expert's layer: a plain megatron-core TransformerLayer.

    Args:
        parts: what it is made of.
        qk_norm: norm q and k per head.
    """
    qk_layernorm = HeadNorm if qk_norm else None
    mlp = MLPSubmodules(linear_fc1=parts.column, activation_func=parts.activation, linear_fc2=parts.row)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column,
                    core_attention=NoCoreAttention,
                    linear_proj=parts.row,
                    q_layernorm=qk_layernorm,
                    k_layernorm=qk_layernorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_submodules(
    num_layers: int,
    parts: Parts,
    attention_backend: str,
    mape_backend: str,
    mrope_section: tuple[int, ...],
    qk_norm: bool,
) -> TransformerBlockSubmodules:
    """Submodules of a TransformerBlock of `num_layers` dual-expert layers without a final norm.

    Args:
        num_layers: layers on this pipeline stage (and virtual stage).
        parts: what the experts' layers are made of.
        attention_backend: of ops.attention.
        mape_backend: of ops.qk_norm_mape.
        mrope_section: frequencies per axis.
        qk_norm: norm q and k per head.
    """
    params = {
        "attention_backend": attention_backend,
        "mape_backend": mape_backend,
        "mrope_section": mrope_section,
        "without_fp8": parts.without_fp8,
    }
    experts = DualExpertLayerSubmodules(und=expert_layer(parts, qk_norm), gen=expert_layer(parts, qk_norm))
    layer = ModuleSpec(module=DualExpertLayer, params=params, submodules=experts)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers)
