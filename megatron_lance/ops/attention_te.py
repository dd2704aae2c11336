"""cuDNN's fused attention through TransformerEngine, as a kernel of ops/attention_varlen.py.

Station: one variable-length call -> [cuDNN] -> attended values and their gradients.  Written against TransformerEngine
2.11; its two functions of cpp_extensions are called as its own attention module calls them, so that gathered keys need
not be kept for backward and no length is read back from the GPU.

Shapes: as in ops/attention_varlen.py.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from megatron_lance.ops.attention_varlen import VarlenCall, why_not_half

OLDEST_CUDNN = (9, 18, 0)  # upstream: gradients of packed sequences are wrong on Hopper before
_LENGTH_STEP = 64  # lengths in a kernel's name are rounded up, as TransformerEngine does, so that kernels are reused


@cache
def why_not_te(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why cuDNN cannot serve through TransformerEngine, and the remedy where there is one; empty if it can."""
    if reason := why_not_half(device, dtype, head_dim):
        return reason
    if find_spec("transformer_engine") is None:
        return "TransformerEngine is not installed"
    try:
        from transformer_engine.pytorch.utils import get_cudnn_version
    except (ImportError, OSError) as error:
        return f"TransformerEngine does not load ({error})"
    version = tuple(get_cudnn_version())
    if version < OLDEST_CUDNN:
        return f"cuDNN {version} is older than {OLDEST_CUDNN}; use a newer one"
    return ""


class FusedKernel:
    """Both calls by cuDNN: masks `padding` and `padding_causal_bottom_right` over packed sequences."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall, training: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """As Kernel.

        Raises:
            RuntimeError: if cuDNN has no kernel for it.
        """
        from transformer_engine.pytorch.cpp_extensions.fused_attn import fused_attn_fwd

        out, state = fused_attn_fwd(
            training,
            *_lengths(call),
            q,
            k,
            v,
            q.dtype,
            _cudnn(training, call.causal, q.dtype, q.shape[1], k.shape[1], q.shape[2], *_rounded(call)),
            **_settings(call),
        )
        return out, tuple(state) if training else ()

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        state: tuple[torch.Tensor, ...],
        call: VarlenCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Kernel."""
        from transformer_engine.pytorch.constants import TE_DType
        from transformer_engine.pytorch.cpp_extensions.fused_attn import fused_attn_bwd

        d_q, d_k, d_v, *_ = fused_attn_bwd(
            *_lengths(call),
            q,
            k,
            v,
            out,
            grad.contiguous(),
            q.dtype,
            TE_DType[q.dtype],
            list(state),
            _cudnn(True, call.causal, q.dtype, q.shape[1], k.shape[1], q.shape[2], *_rounded(call)),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_settings(call),
        )
        return d_q, d_k, d_v


def _rounded(call: VarlenCall) -> tuple[int, int]:
    """Longest sequence in queries and keys, rounded up."""
    queries, keys = (-(-length // _LENGTH_STEP) * _LENGTH_STEP for length in (call.max_queries, call.max_keys))
    return queries, keys


def _lengths(call: VarlenCall) -> tuple[Any, ...]:
    return *_rounded(call), call.cu_queries, call.cu_keys


def _window(causal: bool) -> tuple[int, int]:
    return (-1, 0) if causal else (-1, -1)


def _mask(causal: bool) -> str:
    return "padding_causal_bottom_right" if causal else "padding"


def _settings(call: VarlenCall) -> dict[str, Any]:
    return {
        "cu_seqlens_q_padded": call.cu_queries,  # nothing lies between sequences
        "cu_seqlens_kv_padded": call.cu_keys,
        "qkv_layout": "thd_thd_thd",
        "attn_mask_type": _mask(call.causal),
        "window_size": _window(call.causal),
    }


@cache
def _cudnn(
    training: bool, causal: bool, dtype: torch.dtype, heads: int, groups: int, head_dim: int, queries: int, keys: int
) -> Any:
    """The cuDNN engine for such calls."""
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    engine = fused_attn.tex.get_fused_attn_backend(
        training,
        TE_DType[dtype],
        TE_DType[dtype],
        fused_attn.QKVLayout["thd_thd_thd"],
        fused_attn.AttnBiasType["no_bias"],
        fused_attn.AttnMaskType[_mask(causal)],
        fused_attn.SoftmaxType["vanilla"],
        0.0,
        heads,
        groups,
        queries,
        keys,
        head_dim,
        head_dim,
        *_window(causal),
        False,  # no greatest logit
        False,  # no CUDA graph
    )
    if engine == fused_attn.FusedAttnBackend["No_Backend"]:
        raise RuntimeError(
            f"cuDNN has no packed attention of {heads}:{groups} heads of {head_dim} in {dtype}, "
            f"{_mask(causal)}, {queries} queries, {keys} keys; choose another model.attention_backend"
        )
    return engine
