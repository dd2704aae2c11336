"""Joint attention by FlexAttention, with a block mask built from the plan.

Station: a plan -> [tables, tiles of 128 x 128], once per pack and device; q, k, v -> [flex_attention] -> attended
values, once per layer.  Which tiles are empty, full or mixed is counted on the CPU; in mixed tiles the mask function
reads integer tables of the tokens.

Nothing depends on a pack but the values of tensors: rows, keys and tables are padded to one of eight sizes per power of
two, so packs of one budget share one compiled kernel.  On a GPU it is compiled; elsewhere torch's plain version runs,
which has no backward.

Shapes: lq queries, l tokens of the pack, hq query heads, hkv key/value heads, d channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_lance.ops.attention_varlen import upload
from megatron_lance.packing.attention_plan import AttentionPlan

TILE = 128
_TABLE = 64  # least entries of a table
_SIZES = 64  # kernels at most, before torch.compile gives up
IntArray = npt.NDArray[np.int32]


def why_not_flex(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why FlexAttention cannot serve; empty if it can."""
    if device.type != "cuda":
        return "needs a GPU: torch's FlexAttention has no backward elsewhere"
    if dtype == torch.float64:
        return "has no kernel in float64"
    return "" if head_dim >= 16 else f"head size {head_dim} is below 16"


def padded_length(length: int) -> int:
    """A multiple of TILE that is one of at most eight sizes between two powers of two; at least one tile."""
    step = max(TILE, 2 ** max(0, (length - 1).bit_length() - 4))
    return max(TILE, -(-length // step) * step)


def _padded_table(entries: int) -> int:
    """A power of two above the entries: the last one stands for padding."""
    return int(max(_TABLE, 2 ** int(entries).bit_length()))


def plan_tables(plan: AttentionPlan, queries: int, keys: int) -> tuple[IntArray, IntArray, IntArray, npt.NDArray[Any]]:
    """What tells whether a query may see a key.

    Query q sees key k iff members[slice of q, stretch of k] and k is not after the last key of q.

    Args:
        plan: of the queries.
        queries: padded number of queries.
        keys: padded number of tokens.

    Returns:
        slice number int32 [queries], last key int32 [queries], stretch of tokens int32 [keys], members bool
        [slices, stretches]; padding has the last slice and the last stretch, which nothing sees.
    """
    edges = np.array(sorted({0, *(edge for piece in plan.slices for key_range in piece.keys for edge in key_range)}))
    members = np.zeros((_padded_table(len(plan.slices)), _padded_table(len(edges))), bool)
    slice_of, last_key = np.full(queries, members.shape[0] - 1, np.int32), np.full(queries, keys, np.int32)
    stretch_of = np.full(keys, members.shape[1] - 1, np.int32)
    stretch_of[: plan.length] = np.searchsorted(edges, np.arange(plan.length), side="right") - 1
    at = 0
    for number, piece in enumerate(plan.slices):
        rows = slice(at, at + piece.num_queries)
        slice_of[rows] = number
        for start, stop in piece.keys:
            first, last = np.searchsorted(edges, [start, stop])
            members[number, first:last] = True
        if piece.causal:
            tokens = np.concatenate([np.arange(start, stop) for start, stop in piece.keys])
            last_key[rows] = tokens[piece.num_keys - piece.num_queries :]
        at += piece.num_queries
    return slice_of, last_key, stretch_of, members


def _mask_function(
    slice_of: torch.Tensor, last_key: torch.Tensor, stretch_of: torch.Tensor, members: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    def allowed(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return members[slice_of[query], stretch_of[key]] & (key <= last_key[query])

    return allowed


def _block_lists(chosen: npt.NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    """(number of chosen tiles int32 [1, 1, rows], their columns first int32 [1, 1, rows, columns])."""
    columns = np.argsort(~chosen, axis=1, kind="stable")
    return chosen.sum(1, dtype=np.int32)[None, None], columns.astype(np.int32)[None, None]


def plan_block_mask(plan: AttentionPlan, device: torch.device) -> BlockMask:
    """The block mask of a plan; made once and kept with the plan.

    Args:
        plan: of one rank's queries.
        device: of its tensors.

    Returns:
        of padded_length(queries) x padded_length(tokens).
    """
    found: BlockMask | None = plan.prepared.get(("flex", device))
    if found is not None:
        return found
    queries = padded_length(sum(piece.num_queries for piece in plan.slices))
    keys = padded_length(plan.length)
    counts = plan.tile_counts(TILE, queries // TILE, keys // TILE)
    full = counts == TILE * TILE
    mixed = (counts > 0) & ~full
    mixed_lists, full_lists = ([upload(array, device) for array in _block_lists(chosen)] for chosen in (mixed, full))
    tables = [upload(table, device) for table in plan_tables(plan, queries, keys)]
    found = BlockMask.from_kv_blocks(
        kv_num_blocks=mixed_lists[0],
        kv_indices=mixed_lists[1],
        full_kv_num_blocks=full_lists[0],
        full_kv_indices=full_lists[1],
        BLOCK_SIZE=TILE,
        mask_mod=_mask_function(*tables),
        seq_lengths=(queries, keys),
    )
    plan.prepared["flex", device] = found
    return found


@cache
def _attend(compiled: bool) -> Callable[..., Any]:
    plain: Any = flex_attention
    if not compiled:
        return plain
    limits: Any = torch._dynamo.config  # training meets one or two sizes, sampling as many as its requests have
    limits.recompile_limit = max(limits.recompile_limit, _SIZES)
    return torch.compile(plain, fullgraph=True, dynamic=False)


def _padded(x: torch.Tensor, length: int) -> torch.Tensor:
    """[rows, heads, d] -> [1, heads, length, d], zeros behind."""
    return F.pad(x, (0, 0, 0, 0, 0, length - x.shape[0])).transpose(0, 1).unsqueeze(0)


def flex_attention_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """`joint_attention` by FlexAttention.

    Args:
        q: [lq, hq, d].
        k: [l, hkv, d].
        v: [l, hkv, d].
        plan: of the queries.

    Returns:
        [lq, hq, d].
    """
    mask = plan_block_mask(plan, q.device)
    queries, keys = mask.seq_lengths
    attend = _attend(q.device.type == "cuda")
    inputs = (_padded(q, queries), *(_padded(x.to(q.dtype), keys) for x in (k, v)))
    out: torch.Tensor = attend(*inputs, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)[: q.shape[0]]
