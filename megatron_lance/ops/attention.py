"""Joint attention over packed tokens by the slices of an attention plan (design decision 3).

Station: rotation -> [joint attention] -> output projection.  In: q of some tokens, k and v of all tokens of the pack,
in pack order, and the plan.  Out: the attended values of the queries.  Backends share one meaning:

- ``sdpa``: a loop over the slices with torch's scaled dot product attention; any device.
- ``dense``: one call with the dense mask; the truth for tests, quadratic memory.

Shapes: lq queries, l tokens of the pack, hq query heads, hkv key/value heads, d channels per head.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention.bias import causal_lower_right

from megatron_lance.packing.attention_plan import AttentionPlan, Range

Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan], torch.Tensor]


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: int,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """One rectangle: q [lq, hq, d], k and v [lk, hkv, d], mask bool [lq, lk] or None -> [lq, hq, d]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)
    return out.squeeze(0).transpose(0, 1)


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

    def take(self, ranges: tuple[Range, ...], dtype: torch.dtype) -> torch.Tensor:
        """Rows of the ranges, one after another, cast."""
        parts: list[torch.Tensor] = []
        for start, stop in ranges:
            parts += self.parts[bisect_left(self.edges, start) : bisect_left(self.edges, stop)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _lower_right(n_q: int, n_k: int, device: torch.device) -> torch.Tensor:
    """The bottom-right aligned causal mask: one that CUDA kernels know by name, else as bool [n_q, n_k]."""
    if device.type == "cuda":
        return causal_lower_right(n_q, n_k)
    return torch.ones(n_q, n_k, dtype=torch.bool, device=device).tril(n_k - n_q)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    if not plan.slices:  # keys and values stay in the graph: their gradients are reduced over all ranks
        return q + 0.0 * (k.sum() + v.sum()).to(q.dtype)
    groups = q.shape[1] // k.shape[1]
    keys, values = _Pieces(k, plan), _Pieces(v, plan)
    calls = list(kernel_calls(plan))
    outputs = []
    for (n_q, key_ranges, causal), queries in zip(calls, q.split([call[0] for call in calls]), strict=True):
        n_k = sum(stop - start for start, stop in key_ranges)
        square = n_q == n_k
        mask = _lower_right(n_q, n_k, q.device) if causal and not square else None
        k_slice, v_slice = keys.take(key_ranges, q.dtype), values.take(key_ranges, q.dtype)
        outputs.append(_attend(queries, k_slice, v_slice, groups, mask, causal=causal and square))
    return torch.cat(outputs)


def kernel_calls(plan: AttentionPlan) -> Iterator[tuple[int, tuple[Range, ...], bool]]:
    """(queries, key ranges, causal) of each call.

    Neighbouring slices that see the same keys whole are one call, so that the many chunks of a visual segment on a
    context-parallel rank share one copy of its keys.
    """
    numbered = enumerate(plan.slices)
    for (key_ranges, alone), group in groupby(numbered, lambda item: (item[1].keys, item[0] if item[1].causal else -1)):
        yield sum(piece.num_queries for _, piece in group), key_ranges, alone >= 0


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    full = torch.from_numpy(plan.dense()).to(q.device)
    rows = [torch.arange(*piece.query, device=q.device) for piece in plan.slices]
    mask = full[torch.cat(rows)] if rows else full[:0]
    return _attend(q, k.to(q.dtype), v.to(q.dtype), q.shape[1] // k.shape[1], mask)


BACKENDS: dict[str, Backend] = {"sdpa": _sdpa, "dense": _dense}


def joint_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, backend: str
) -> torch.Tensor:
    """Attention of packed tokens; softmax scale is 1/sqrt(d), query head h uses key/value head h // (hq / hkv).

    Args:
        q: [lq, hq, d], the queries of the plan's slices one after another.
        k: [l, hkv, d] in pack order; may be of higher precision than q: gradients of k and v are accumulated over
            slices in k's and v's own precision.
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
    return BACKENDS[backend](q, k, v, plan)
