"""Joint attention over packed tokens by the slices of an attention plan (design decision 3).

Station: rotation -> [joint attention] -> output projection.  In: q of some tokens, k and v of all tokens of the pack,
in pack order, and the plan.  Out: the attended values of the queries.  Backends share one meaning:

- ``varlen_te``, ``varlen_torch``: two variable-length calls over gathered keys, by cuDNN through TransformerEngine and
  by the FlashAttention that torch carries; ``varlen_emulated``: the same calls sequence by sequence, on any device;
- ``flex``: FlexAttention with a block mask built from the plan;
- ``sdpa``: a loop over the slices with torch's scaled dot product attention; any device;
- ``dense``: one call with the dense mask; the truth for tests, quadratic memory.

A query without any key gives zeros.  ops/attention_trial.py chooses between them.

Shapes: lq queries, l tokens of the pack, hq query heads, hkv key/value heads, d channels per head.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch

from megatron_lance.ops.attention_flex import flex_attention_of, why_not_flex
from megatron_lance.ops.attention_te import FusedKernel, why_not_te
from megatron_lance.ops.attention_varlen import (
    EmulatedKernel,
    FlashKernel,
    Kernel,
    kernel_calls,
    varlen_attention,
    why_not_half,
)
from megatron_lance.ops.rectangle import attend, attend_slice
from megatron_lance.packing.attention_plan import AttentionPlan, Range


@dataclass(frozen=True)
class Backend:
    """A way to attend.

    Attributes:
        attend: q, k, v and plan -> attended values, see `joint_attention`.
        why_not: device, type of q, channels per head -> why it cannot serve there; empty if it can.
    """

    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan], torch.Tensor]
    why_not: Callable[[torch.device, torch.dtype, int], str]


class _Pieces:
    """A tensor cut once at every edge of a plan's key ranges.

    Slices share pieces; cutting once keeps backward from adding a whole-pack gradient per slice, as indexing would.
    Gradients of a piece are added in the tensor's own (float32) precision, in slice order.
    """

    def __init__(self, x: torch.Tensor, plan: AttentionPlan) -> None:
        edges = {0, plan.length, *(edge for piece in plan.slices for key_range in piece.keys for edge in key_range)}
        self.edges = sorted(edges)
        sizes = [stop - start for start, stop in pairwise(self.edges)]
        self.parts = x.split(sizes)
        self.none = x[:0]

    def take(self, ranges: tuple[Range, ...], dtype: torch.dtype) -> torch.Tensor:
        """Rows of the ranges, one after another, cast."""
        parts: list[torch.Tensor] = []
        for start, stop in ranges:
            parts += self.parts[bisect_left(self.edges, start) : bisect_left(self.edges, stop)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts or [self.none])).to(dtype)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    if not plan.slices:  # keys and values stay in the graph: their gradients are reduced over all ranks
        return q + 0.0 * (k.sum() + v.sum()).to(q.dtype)
    keys, values = _Pieces(k, plan), _Pieces(v, plan)
    calls = list(kernel_calls(plan))
    outputs = []
    for (_, key_ranges, causal), queries in zip(calls, q.split([call[0] for call in calls]), strict=True):
        k_slice, v_slice = keys.take(key_ranges, q.dtype), values.take(key_ranges, q.dtype)
        outputs.append(attend_slice(queries, k_slice, v_slice, causal))
    return torch.cat(outputs)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    full = torch.from_numpy(plan.dense()).to(q.device)
    rows = [torch.arange(*piece.query, device=q.device) for piece in plan.slices]
    mask = full[torch.cat(rows)] if rows else full[:0]
    return attend(q, k.to(q.dtype), v.to(q.dtype), mask)


def _anywhere(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return ""


KERNELS: dict[str, Kernel] = {
    "varlen_te": FusedKernel(),
    "varlen_torch": FlashKernel(),
    "varlen_emulated": EmulatedKernel(),
}
"""Of the variable-length backends."""


def _varlen(name: str, why_not: Callable[[torch.device, torch.dtype, int], str]) -> Backend:
    return Backend(partial(varlen_attention, kernel=KERNELS[name]), why_not)


BACKENDS: dict[str, Backend] = {
    "varlen_te": _varlen("varlen_te", why_not_te),
    "varlen_torch": _varlen("varlen_torch", why_not_half),
    "flex": Backend(flex_attention_of, why_not_flex),
    "sdpa": Backend(_sdpa, _anywhere),
    "varlen_emulated": _varlen("varlen_emulated", _anywhere),
    "dense": Backend(_dense, _anywhere),
}


def joint_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, backend: str
) -> torch.Tensor:
    """Attention of packed tokens; softmax scale is 1/sqrt(d), query head h uses key/value head h // (hq / hkv).

    Args:
        q: [lq, hq, d], the queries of the plan's slices one after another.
        k: [l, hkv, d] in pack order; may be of higher precision than q: gradients of k and v are accumulated over
            slices in float32 or, if that is more, in k's and v's own precision.
        v: [l, hkv, d] in pack order.
        plan: whose slices' query ranges have lq tokens together.
        backend: a key of BACKENDS.

    Returns:
        [lq, hq, d] in q's dtype.

    Raises:
        ValueError: if the row counts contradict the plan or the backend is unknown.
    """
    queries = sum(piece.num_queries for piece in plan.slices)
    if q.shape[0] != queries or k.shape[0] != plan.length or v.shape[0] != plan.length:
        raise ValueError(
            f"joint attention of {q.shape[0]} queries and {k.shape[0]}, {v.shape[0]} keys and values: the plan has "
            f"{queries} queries and {plan.length} tokens"
        )
    if backend not in BACKENDS:
        raise ValueError(f"model.attention_backend {backend!r}: choose one of {sorted(BACKENDS)}")
    return BACKENDS[backend].attend(q, k, v, plan)
