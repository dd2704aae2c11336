"""The one attention both experts share.

Station: rotation -> [joint attention] -> output projections.  In: q, k, v of the rows of one context-parallel rank,
[und region | gen region].  Out: attended values of the same rows; padding rows are zero.  Keys and values of all
context-parallel ranks are gathered (reduce-scattered in backward), in float32, so that gradients of keys and values
are accumulated in float32 in a fixed order.

Shapes: R rows of the cp rank, L tokens of the pack, np query heads and ng key/value heads of this tp rank, hn head
channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import nn

from megatron_lance.ops.attention import joint_attention
from megatron_lance.packing.attention_plan import AttentionPlan


@dataclass(kw_only=True)
class PackContext(PackedSeqParams):
    """What the layers need to know of the pack at hand.

    It rides in `packed_seq_params`, which megatron-core hands to every layer by closure, also under recompute.

    Attributes:
        region_rows: (und, gen) rows of this cp rank.
        shard_rows: (und, gen) rows of this tp rank's shard.
        plan: slices whose queries lie on this cp rank.
        query_rows: int64 [queries], see RankBatch.
        row_queries: int64 [R].
        key_rows: int64 [L].
        cos: float32 [R, hn/2].
        sin: float32 [R, hn/2].
    """

    region_rows: tuple[int, int]
    shard_rows: tuple[int, int]
    plan: AttentionPlan
    query_rows: torch.Tensor
    row_queries: torch.Tensor
    key_rows: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class JointAttention(nn.Module):
    """Parameter-free attention over a pack.

    Args:
        backend: of ops.attention.
        cp_group: the context-parallel ranks that share the pack.
    """

    def __init__(self, backend: str, cp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.backend = backend
        self.cp_group = cp_group

    def _pack_order(self, x: torch.Tensor, key_rows: torch.Tensor) -> torch.Tensor:
        """Keys or values of one rank [R, ng, hn] -> of the whole pack [L, ng, hn], float32."""
        x = x.float()
        if self.cp_group.size() > 1:
            x = gather_from_sequence_parallel_region(x, group=self.cp_group)  # [cp * R, ng, hn]
        return x.index_select(0, key_rows)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: PackContext) -> torch.Tensor:
        """Rotated q [R, np, hn] and k, and v [R, ng, hn] -> attended values [R, np, hn]."""
        queries = q.index_select(0, context.query_rows)
        keys, values = (self._pack_order(x, context.key_rows) for x in (k, v))
        out = joint_attention(queries, keys, values, context.plan, self.backend)
        padded = torch.cat([out, out.new_zeros(1, *out.shape[1:])])  # row_queries of padding points at the zero row
        return padded.index_select(0, context.row_queries)
