"""Joint attention over packed tokens by the slices of an attention plan (design decision 3).

Station: rotation -> [joint attention] -> output projection.  In: q of some tokens, k and v of all tokens of the pack,
in pack order, and the plan.  Out: the attended values of the queries.  Backends share one meaning:

- ``sdpa``: a loop over the slices with torch's scaled dot product attention; any device.
- ``dense``: one call with the dense mask; the truth for tests, quadratic memory.

Shapes: lq queries, l tokens of the pack, hq query heads, hkv key/value heads, d channels per head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from megatron_lance.packing.attention_plan import AttentionPlan

Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionPlan], torch.Tensor]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, groups: int) -> torch.Tensor:
    """One rectangle: q [lq, hq, d], k and v [lk, hkv, d], mask bool [lq, lk] or None -> [lq, hq, d]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)
    return out.squeeze(0).transpose(0, 1)


def _gather(x: torch.Tensor, ranges: tuple[tuple[int, int], ...], dtype: torch.dtype) -> torch.Tensor:
    """Rows of the ranges, cast; each slice's gradient is added to x in x's own (float32) precision."""
    parts = [x[start:stop] for start, stop in ranges]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    outputs, at = [], 0
    for piece in plan.slices:
        n_q, n_k = piece.num_queries, piece.num_keys
        mask = None
        if piece.causal:
            mask = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        keys, values = (_gather(x, piece.keys, q.dtype) for x in (k, v))
        outputs.append(_attend(q[at : at + n_q], keys, values, mask, groups))
        at += n_q
    if not outputs:  # keys and values stay in the graph: their gradients are collectives that other ranks wait for
        return q + k.sum() + v.sum()
    return torch.cat(outputs)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    full = torch.from_numpy(plan.dense()).to(q.device)
    rows = [torch.arange(*piece.query, device=q.device) for piece in plan.slices]
    mask = full[torch.cat(rows)] if rows else full[:0]
    return _attend(q, k.to(q.dtype), v.to(q.dtype), mask, q.shape[1] // k.shape[1])


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
