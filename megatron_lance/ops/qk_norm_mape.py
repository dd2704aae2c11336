"""QK-norm and MaPE rotation of one expert's QKV in one pass (spec/model.md sections 2 and 4).

Station: QKV projection -> [QK-norm, rotation] -> joint attention.  In: the interleaved QKV of one expert's rows,
integer positions that already carry MaPE, norm weights.  Out: q, on request in its slice of the buffer that holds the
rows of both experts, and k and v side by side, as they travel between context-parallel ranks.

Backends: ``fused``, the compiled op of kernels/ (CPU, CUDA), reads QKV once, writes q, k and v once, and writes dQKV
once in backward; ``reference`` is the same in plain torch.

Shapes: r rows, g key/value heads, n query heads per group in QKV, of which m are taken, d head channels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from megatron_lance.ops.mape import rotary_angles, rotate

logger = logging.getLogger(__name__)

Heads = tuple[torch.Tensor, torch.Tensor]
"""q [r, g * m, d]; k and v [r, 2, g, d]."""

MAX_HEAD_DIM = 256


class FusedUnavailable(ValueError):  # noqa: N818  the state of the installation, said to the user
    """The fused op was asked for and cannot serve; the message says why and what to do."""


def _load() -> str:
    """Load the compiled ops; why they cannot serve, empty if they can."""
    files = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not files:
        return "the compiled ops are not built; run `python setup.py build_ext --inplace`"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"{files[0].name} does not load ({error}); run `python setup.py build_ext --inplace --force`"
    return ""


_NOT_LOADED = _load()


def why_not_fused(head_dim: int, device: torch.device) -> str:
    """Why the fused op cannot serve heads of this size on this device, and the remedy; empty if it can."""
    if _NOT_LOADED:
        return _NOT_LOADED
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        return f"head size {head_dim} is no multiple of 8 up to {MAX_HEAD_DIM}; use the reference"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("megatron_lance::qk_norm_mape", device.type.upper()):
        return f"the compiled ops lack {device.type}; run `MEGATRON_LANCE_CUDA=1 python setup.py build_ext --inplace`"
    return ""


@cache
def choose_backend(requested: str, head_dim: int, device: torch.device) -> str:
    """The backend of a run; said once in the log.

    Args:
        requested: `auto` (fused if it can serve), `fused` or `reference`.
        head_dim: channels per head.
        device: of the activations.

    Returns:
        `fused` or `reference`.

    Raises:
        FusedUnavailable: if `fused` was asked for and cannot serve.
        ValueError: for another name.
    """
    if requested not in ("auto", "fused", "reference"):
        raise ValueError(f"ops.mape {requested!r}: choose one of auto, fused, reference")
    reason = why_not_fused(head_dim, device)
    if requested == "fused" and reason:
        raise FusedUnavailable(reason)
    backend = "reference" if requested == "reference" or reason else "fused"
    because = f": {reason}" if requested == "auto" and reason else ""
    logger.info("QK-norm and rotation: %s (ops.mape = %s)%s", backend, requested, because)
    return backend


def _head_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm of every head [..., d] in float32, rounded to x's dtype, then scaled; x itself without a weight."""
    return x if weight is None else F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight


def _reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    sections: Sequence[int],
    query_heads: int,
    query_offset: int,
    eps: float,
) -> Heads:
    d = 2 * inv_freq.shape[0]
    heads = qkv.view(*qkv.shape[:2], qkv.shape[2] // d, d)  # [r, g, n + 2, d]
    query = heads[:, :, query_offset : query_offset + query_heads].flatten(1, 2)
    key, value = heads[:, :, -2], heads[:, :, -1]
    cos, sin = rotary_angles(positions, inv_freq, sections)
    query = rotate(_head_norm(query, query_weight, eps), cos, sin)
    key = rotate(_head_norm(key, key_weight, eps), cos, sin)
    return query, torch.stack([key, value], dim=1)


def _check(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    sections: Sequence[int],
    query_heads: int,
    query_offset: int,
) -> None:
    if inv_freq.dim() != 1 or inv_freq.dtype != torch.float32:
        raise ValueError(f"inv_freq {inv_freq.dtype} {list(inv_freq.shape)}: must be float32 [head size / 2]")
    d = 2 * inv_freq.shape[0]
    heads = qkv.shape[-1] // d - 2
    if qkv.dim() != 3 or qkv.shape[-1] % d or heads < 1:
        raise ValueError(f"qkv {list(qkv.shape)}: must be [rows, groups, (query heads + 2) * {d}]")
    if positions.shape != (3, qkv.shape[0]) or positions.dtype != torch.int32:
        raise ValueError(f"positions {positions.dtype} {list(positions.shape)}: must be int32 [3, {qkv.shape[0]}]")
    if any(w is not None and (w.shape != (d,) or w.dtype != qkv.dtype) for w in weights):
        given = [w if w is None else (w.dtype, list(w.shape)) for w in weights]
        raise ValueError(f"norm weights {given}: must be {qkv.dtype} [{d}]")
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != d // 2:
        raise ValueError(f"sections {tuple(sections)}: must be three counts that sum to {d // 2}")
    if query_heads < 1 or query_offset < 0 or query_offset + query_heads > heads:
        raise ValueError(f"query heads {query_offset}..{query_offset + query_heads}: qkv has {heads} per group")


def qk_norm_mape(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    *,
    sections: Sequence[int],
    eps: float,
    backend: str,
    query_heads: int | None = None,
    query_offset: int = 0,
    out: torch.Tensor | None = None,
) -> Heads:
    """RMSNorm of every q and k head, then rotation of its halves by MaPE angles; v is passed on.

    The angle of frequency j is float32(position) * inv_freq[j] rounded to float32, the position that of j's axis.
    Sine and cosine are exact to float32 rounding for positions up to 2^20.

    Args:
        qkv: [r, g, (n + 2) * d], Megatron's interleaved layout: per group n query heads, the key and the value head.
            Rows and groups may have any stride.
        positions: int32 [3, r]: temporal, height, width.
        inv_freq: float32 [d/2].
        query_weight: [d], in qkv's dtype; None: no norm, which only the reference offers.
        key_weight: [d], in qkv's dtype; None as above.
        sections: frequencies per axis; three counts that sum to d/2.
        eps: added to the mean square.
        backend: `fused` or `reference`, from `choose_backend`.
        query_heads: query heads taken per group, m; all by default.
        query_offset: the first of them, when a group's query heads belong to several tensor-parallel ranks.
        out: [r, g * m, d], where to write q, such as a slice of a joint buffer; the returned q aliases it.  The
            reference and a compiled graph return a q of their own instead; `join` treats both alike.

    Returns:
        q [r, g * m, d]; k and v [r, 2, g, d]; in qkv's dtype.

    Raises:
        ValueError: if shapes or dtypes contradict one another.
        RuntimeError: from the fused op, if the channels of a head or, in `out`, the heads of a row are not compact; on
            a GPU also if rows are not aligned to 16 bytes (8 where half a head is no multiple of 16 bytes).
        NotImplementedError: from the fused op, in the backward pass of its backward pass.
    """
    heads = qkv.shape[-1] // (2 * inv_freq.shape[0]) - 2 if query_heads is None else query_heads
    _check(qkv, positions, inv_freq, (query_weight, key_weight), sections, heads, query_offset)
    tensors = (qkv, positions, inv_freq, query_weight, key_weight)
    if backend == "reference":
        return _reference(*tensors, sections, heads, query_offset, eps)
    if query_weight is None or key_weight is None:
        raise ValueError("norm weights None: the fused op norms; use the reference")
    if out is None or torch.compiler.is_compiling():
        return torch.ops.megatron_lance.qk_norm_mape(*tensors, list(sections), heads, query_offset, eps)
    return _Into.apply(*tensors, (list(sections), heads, query_offset, eps), out)


class _Into(torch.autograd.Function):
    """The fused op with q in a given tensor."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Heads:
        *tensors, settings, out = args
        qkv, d = tensors[0], tensors[3].shape[0]
        query = out.data  # slices of one buffer are disjoint: writing one must not mark the others as modified
        key_value = qkv.new_empty(qkv.shape[0], 2, qkv.shape[1], d)
        torch.ops.megatron_lance.qk_norm_mape_out(*tensors, *settings, query, key_value)
        ctx.save_for_backward(*tensors)
        ctx.settings = settings
        return query, key_value

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_gradients(ctx, grads), None, None


def _gradients(ctx: Any, grads: Sequence[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    d_qkv, d_query_weight, d_key_weight = torch.ops.megatron_lance.qk_norm_mape_backward(
        *grads, *ctx.saved_tensors, *ctx.settings
    )
    return d_qkv, None, None, d_query_weight, d_key_weight


class _Join(torch.autograd.Function):
    """One tensor over parts that lie one after another in one buffer."""

    @staticmethod
    def forward(ctx: Any, *parts: torch.Tensor) -> torch.Tensor:
        ctx.sizes = [len(part) for part in parts]
        first = parts[0].data
        return first.as_strided((sum(ctx.sizes), *first.shape[1:]), first.stride(), first.storage_offset())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grad.split(ctx.sizes)


def _adjacent(parts: Sequence[torch.Tensor]) -> bool:
    storage, at = parts[0].untyped_storage().data_ptr(), parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != at or not part.is_contiguous():
            return False
        at += part.numel()
    return True


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch.cat(parts), without a copy if the parts lie one after another in one buffer.

    Args:
        parts: [r_i, ...] each; written once, and not to be changed in place afterwards.

    Returns:
        [sum of r_i, ...].
    """
    if torch.compiler.is_compiling() or not _adjacent(parts):
        return torch.cat(list(parts))
    return _Join.apply(*parts)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Heads) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_gradients(ctx, grads), None, None, None, None


def _no_second_backward(ctx: Any, *grads: torch.Tensor) -> None:
    raise NotImplementedError("qk_norm_mape: the fused op has no second derivative; use the reference")


def _fake(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    sections: list[int],
    query_heads: int,
    query_offset: int,
    eps: float,
) -> Heads:
    rows, groups, d = qkv.shape[0], qkv.shape[1], query_weight.shape[0]
    return qkv.new_empty(rows, groups * query_heads, d), qkv.new_empty(rows, 2, groups, d)


def _fake_out(*args: object) -> None:
    return None


def _fake_backward(
    d_query: torch.Tensor, d_key_value: torch.Tensor, qkv: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query_weight, key_weight = rest[2:4]
    return qkv.new_empty(qkv.shape), torch.empty_like(query_weight), torch.empty_like(key_weight)


if not _NOT_LOADED:
    torch.library.register_fake("megatron_lance::qk_norm_mape", _fake)
    torch.library.register_fake("megatron_lance::qk_norm_mape_out", _fake_out)
    torch.library.register_fake("megatron_lance::qk_norm_mape_backward", _fake_backward)
    torch.library.register_autograd("megatron_lance::qk_norm_mape", _backward, setup_context=_setup_context)
    torch.library.register_autograd("megatron_lance::qk_norm_mape_backward", _no_second_backward)
