"""Joint attention as two variable-length calls over gathered keys: one bottom-right causal, one full.

Station: a plan -> [calls, index tensors], once per pack and device; q, k, v -> [gather, kernel, scatter] -> attended
values, once per layer.  A slice is causal over what comes before it and itself, or full, so every query is in exactly
one call and nothing has to be merged.  Slices that see the same keys whole share one copy of them (`kernel_calls`).

What backward keeps is q, the keys and values of all tokens, the output and the kernel's own statistics; gathered keys
are gathered again.  Gradients of keys are added in float32 in rounds: in a round no token occurs twice, so the order
of additions is fixed.

Shapes: lq queries, l tokens of the pack, n sequences of a call with nq queries and nk gathered keys together, hq query
heads, hkv key/value heads, d channels per head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_lance.ops.rectangle import attend_slice
from megatron_lance.packing.attention_plan import AttentionPlan, Range

IntArray = npt.NDArray[np.int64]
HALF_TYPES = (torch.bfloat16, torch.float16)
MAX_FLASH_HEAD_DIM = 256


def kernel_calls(plan: AttentionPlan) -> Iterator[tuple[int, tuple[Range, ...], bool]]:
    """(queries, key ranges, causal) of each rectangle, in the order of the plan's queries.

    Neighbouring slices that see the same keys whole are one, so that the many chunks of a visual segment on a
    context-parallel rank share one copy of its keys.
    """
    numbered = enumerate(plan.slices)
    for (key_ranges, alone), group in groupby(numbered, lambda item: (item[1].keys, item[0] if item[1].causal else -1)):
        yield sum(piece.num_queries for _, piece in group), key_ranges, alone >= 0


@dataclass(frozen=True)
class VarlenCall:
    """One variable-length call: its sequences, and where their queries and keys come from.

    Attributes:
        causal: bottom-right aligned causal in every sequence, else full.
        queries: queries of each sequence, n entries.
        keys: keys of each sequence, n entries, none of them 0.
        query_rows: int64 [nq], rows of q.
        key_tokens: int64 [nk], tokens of the pack.
        cu_queries: int32 [n + 1], where each sequence's queries begin.
        cu_keys: int32 [n + 1], where each sequence's keys begin.
        rounds: (int64 rows of the gathered keys, int64 their tokens) pairs; together all rows, in each no token twice.
    """

    causal: bool
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_rows: torch.Tensor
    key_tokens: torch.Tensor
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    rounds: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def max_queries(self) -> int:
        """Of the longest sequence."""
        return max(self.queries)

    @property
    def max_keys(self) -> int:
        """Of the longest sequence."""
        return max(self.keys)


class Kernel(Protocol):
    """What attends the sequences of a call; q [nq, hq, d], k and v [nk, hkv, d] of one type."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall, training: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(attended values [nq, hq, d], what backward needs beside them)."""

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
        """Gradients of q, k and v from that of the attended values."""


def _ranges(ranges: Sequence[Range]) -> IntArray:
    return np.concatenate([np.arange(0), *(np.arange(start, stop) for start, stop in ranges)])


def _rounds(tokens: IntArray) -> list[tuple[IntArray, IntArray]]:
    """Rows by how often their token occurred before."""
    order = np.argsort(tokens, kind="stable")
    ordered = tokens[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    earlier = np.empty_like(tokens)
    earlier[order] = np.arange(len(tokens)) - np.repeat(first, np.diff(first, append=len(tokens)))
    by_round = [np.flatnonzero(earlier == number) for number in range(int(earlier.max()) + 1)]
    return [(rows, tokens[rows]) for rows in by_round]


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy on the device; from pinned memory and without waiting where it is a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _call(causal: bool, pieces: Sequence[tuple[Range, tuple[Range, ...]]], device: torch.device) -> VarlenCall:
    """The call of some (rows of q, key ranges)."""
    queries = [stop - start for (start, stop), _ in pieces]
    keys = [sum(stop - start for start, stop in ranges) for _, ranges in pieces]
    tokens = _ranges([key_range for _, ranges in pieces for key_range in ranges])
    rounds = _rounds(tokens)
    parts = [_ranges([rows for rows, _ in pieces]), tokens, *(part for pair in rounds for part in pair)]
    rows, tokens_there, *rest = upload(np.concatenate(parts), device).split([len(part) for part in parts])
    return VarlenCall(
        causal=causal,
        queries=tuple(queries),
        keys=tuple(keys),
        query_rows=rows,
        key_tokens=tokens_there,
        cu_queries=upload(np.cumsum([0, *queries], dtype=np.int32), device),
        cu_keys=upload(np.cumsum([0, *keys], dtype=np.int32), device),
        rounds=tuple(zip(rest[::2], rest[1::2], strict=True)),
    )


def varlen_calls(plan: AttentionPlan, device: torch.device) -> tuple[VarlenCall, ...]:
    """The calls of a plan, at most two; made once and kept with the plan.

    Args:
        plan: of one rank's queries.
        device: of the index tensors.

    Returns:
        calls whose query rows are disjoint; queries without keys are in none.
    """
    found: tuple[VarlenCall, ...] | None = plan.prepared.get(("varlen", device))
    if found is not None:
        return found
    at, pieces = 0, {True: list[tuple[Range, tuple[Range, ...]]](), False: []}
    for queries, ranges, causal in kernel_calls(plan):
        if queries and any(start < stop for start, stop in ranges):
            pieces[causal].append(((at, at + queries), ranges))
        at += queries
    found = tuple(_call(causal, of_kind, device) for causal, of_kind in pieces.items() if of_kind)
    plan.prepared["varlen", device] = found
    return found


class _Varlen(torch.autograd.Function):
    """The calls of a plan by one kernel."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, calls: tuple[VarlenCall, ...], kernel: Kernel
    ) -> torch.Tensor:
        """[lq, hq, d], zeros for queries that no call has."""
        training = any(ctx.needs_input_grad)
        keys, values = k.to(q.dtype), v.to(q.dtype)
        attended = sum(len(call.query_rows) for call in calls)
        result = q.new_empty(q.shape) if attended == len(q) else q.new_zeros(q.shape)
        kept: list[torch.Tensor] = []
        states = []
        for call in calls:
            inputs = (q.index_select(0, call.query_rows), *_gather(keys, values, call))
            out, state = kernel.forward(*inputs, call, training)
            result.index_copy_(0, call.query_rows, out)
            kept += [out, *state]
            states.append(1 + len(state))
        if training:
            ctx.save_for_backward(q, keys, values, *kept)
        ctx.calls, ctx.kernel, ctx.states, ctx.key_type = calls, kernel, states, k.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q in its type, of k and v added in float32 or their own type if that is more."""
        q, keys, values, *kept = ctx.saved_tensors
        wide = torch.promote_types(ctx.key_type, torch.float32)
        d_q = torch.zeros_like(q)
        d_keys, d_values = (keys.new_zeros(keys.shape, dtype=wide) for _ in range(2))
        for call, count in zip(ctx.calls, ctx.states, strict=True):
            (out, *state), kept = kept[:count], kept[count:]
            inputs = (q.index_select(0, call.query_rows), *_gather(keys, values, call))
            grad = grads[0].index_select(0, call.query_rows)
            d_queries, *gathered = ctx.kernel.backward(grad, *inputs, out, tuple(state), call)
            d_q.index_copy_(0, call.query_rows, d_queries)
            for total, part in zip((d_keys, d_values), gathered, strict=True):
                for rows, tokens in call.rounds:
                    total.index_add_(0, tokens, part.index_select(0, rows).to(wide))
        return d_q, d_keys.to(ctx.key_type), d_values.to(ctx.key_type), None, None


def _gather(keys: torch.Tensor, values: torch.Tensor, call: VarlenCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a call's sequences, one after another, [nk, hkv, d]."""
    return keys.index_select(0, call.key_tokens), values.index_select(0, call.key_tokens)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, kernel: Kernel
) -> torch.Tensor:
    """`joint_attention` by a variable-length kernel.

    Args:
        q: [lq, hq, d].
        k: [l, hkv, d].
        v: [l, hkv, d].
        plan: of the queries.
        kernel: computes the calls.

    Returns:
        [lq, hq, d].
    """
    result: torch.Tensor = _Varlen.apply(q, k, v, varlen_calls(plan, q.device), kernel)
    return result


class EmulatedKernel:
    """The calls sequence by sequence with scaled dot product attention, on any device and in any type."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall, training: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """As Kernel."""
        split = zip(q.split(call.queries), k.split(call.keys), v.split(call.keys), strict=True)
        return torch.cat([attend_slice(*parts, call.causal) for parts in split]), ()

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
        """As Kernel; runs the forward pass again."""
        with torch.enable_grad():
            queries, keys, values = (x.detach().requires_grad_() for x in (q, k, v))
            again, _ = self.forward(queries, keys, values, call, True)
            d_q, d_k, d_v = torch.autograd.grad(again, (queries, keys, values), grad)
        return d_q, d_k, d_v


class FlashKernel:
    """The FlashAttention that torch carries (what torch.nn.attention.varlen calls), on a GPU in 16-bit types.

    Its causal mask is bottom-right aligned and it takes grouped heads as they are.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall, training: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """As Kernel."""
        lengths = (call.cu_queries, call.cu_keys, call.max_queries, call.max_keys)
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, call.causal, False)
        return out, (lse, seed, offset)

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
        lse, seed, offset = state
        lengths = (call.cu_queries, call.cu_keys, call.max_queries, call.max_keys)
        d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, *lengths, 0.0, call.causal, seed, offset
        )
        return d_q, d_k, d_v


def why_not_half(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why a 16-bit GPU kernel cannot serve; empty if it can."""
    if device.type != "cuda":
        return "needs a GPU"
    if dtype not in HALF_TYPES:
        return f"computes in 16-bit types, not in {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > MAX_FLASH_HEAD_DIM:
        return f"head size {head_dim} is no multiple of 8 up to {MAX_FLASH_HEAD_DIM}"
    return ""
