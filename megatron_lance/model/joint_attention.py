"""The one attention both experts share.

Station: rotation -> [joint attention] -> output projections.  In: q, k, v of the rows of one context-parallel rank, und
region and gen region.  Out: attended values of the same rows; padding rows are zero.

Keys and values of all context-parallel ranks are gathered, region by region, so that the und region's are under way
while the gen expert still projects its own.  They travel in the model's precision; their gradients are accumulated over
slices and reduce-scattered over ranks in float32, in a fixed order.

Shapes: R rows of the cp rank, S of them in one region, L tokens of the pack, np query heads and ng key/value heads of
this tp rank, hn head channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import nn

from megatron_lance.model.offload import ForwardPass
from megatron_lance.ops.attention import joint_attention
from megatron_lance.packing.attention_plan import AttentionPlan


class KeyValueCache:
    """Keys and values of a pack that several passes fill part by part; for sampling, without gradients.

    A pass over some of the tokens writes theirs and attends to all that are there.

    Args:
        length: tokens of the pack, L.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.layers: dict[int, torch.Tensor] = {}  # by global layer number, [L, 2, ng, hn]

    def update(self, layer: int, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Write the rows [K, 2, ng, hn] of int64 [K] tokens of a layer; returns all of its rows [L, 2, ng, hn]."""
        if layer not in self.layers:
            self.layers[layer] = rows.new_zeros(self.length, *rows.shape[1:])
        return self.layers[layer].index_copy_(0, tokens, rows)

    def first(self, length: int) -> KeyValueCache:
        """The first tokens of the pack; what is written there is written here too."""
        part = KeyValueCache(length)
        part.layers = {layer: rows[:length] for layer, rows in self.layers.items()}
        return part


@dataclass(kw_only=True)
class PackContext(PackedSeqParams):
    """What the layers need to know of the pack at hand.

    It rides in `packed_seq_params`, which megatron-core hands to every layer by closure, also under recompute.

    Attributes:
        region_rows: (und, gen) rows of this cp rank.
        shard_rows: (und, gen) rows of this tp rank's shard.
        small: whether the (und, gen) region is too small for FP8, see Layout.
        plan: slices whose queries lie on this cp rank.
        query_rows: int64 [queries], see RankBatch.
        row_queries: int64 [R].
        key_rows: int64 [K], see RankBatch.
        key_tokens: int64 [K].
        cache: keys and values of the tokens without rows; None where all tokens have rows.
        positions: int32 [3, R], with MaPE.
        inv_freq: float32 [hn/2].
        offload: moves what layers save to the host; None: nothing does.
    """

    region_rows: tuple[int, int]
    shard_rows: tuple[int, int]
    small: tuple[bool, bool]
    plan: AttentionPlan
    query_rows: torch.Tensor
    row_queries: torch.Tensor
    key_rows: torch.Tensor
    key_tokens: torch.Tensor
    cache: KeyValueCache | None
    positions: torch.Tensor
    inv_freq: torch.Tensor
    offload: ForwardPass | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Those that live as long as the pack."""
        return [value for value in vars(self).values() if isinstance(value, torch.Tensor)]


class KeyValueExchange:
    """The keys and values of one layer and pack on their way to all context-parallel ranks, and their gradients back.

    One buffer holds the rows of all ranks, first the und regions, then the gen regions (`key_rows` says where each
    token is); `send` starts a region's gather, `receive` waits for both.  Backward mirrors it: the reduction of the gen
    region's gradients starts first, and the und region's is under way while gen's projections run backward.

    Args:
        context: of the pack.
        group: the context-parallel ranks.
        layer: global number, for the cache.
        keep: keep the joined rows after they were received, to receive them again.
    """

    def __init__(self, context: PackContext, group: dist.ProcessGroup, layer: int, keep: bool) -> None:
        self.context, self.group, self.layer, self.keep = context, group, layer, keep
        self.joined_rows = [rows * group.size() for rows in context.region_rows]
        self.rows: torch.Tensor | None = None  # [cp * R, 2, ng, hn]
        self.reduced: list[torch.Tensor | None] = [None, None]  # float32 [S, 2, ng, hn] by region
        self.under_way: list[dist.Work | None] = [None, None]

    def send(self, region: int, own: torch.Tensor) -> torch.Tensor:
        """Start the gather of one region (0 und, 1 gen); own holds its k and v, [S, 2, ng, hn].

        Returns:
            a stand-in for what is under way, to be handed to `receive`.
        """
        stand_in: torch.Tensor = _Send.apply(own, self, region)
        return stand_in

    def receive(self, *stand_ins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole pack, each [L, ng, hn] in pack order; float32 unless they are cached."""
        if self.context.cache is not None:
            cached = self.context.cache.update(self.layer, self.context.key_tokens, self.joined())
            return cached[:, 0], cached[:, 1]
        keys, values = _Receive.apply(self, *stand_ins)
        return keys, values

    def joined(self) -> torch.Tensor:
        """Wait for both regions; the rows of all tokens that have one, [K, 2, ng, hn], ascending by token."""
        for region in range(len(self.joined_rows)):
            self.wait(region)
        assert self.rows is not None
        rows = self.rows.index_select(0, self.context.key_rows)
        if not self.keep:
            self.rows = None
        return rows

    def start_gather(self, region: int, own: torch.Tensor) -> None:
        """Begin to fill the buffer's rows of a region from every rank's own."""
        if self.rows is None:
            self.rows = own.new_empty(sum(self.joined_rows), *own.shape[1:])
        joined = self.rows.split(self.joined_rows)[region]
        if self.group.size() == 1:
            joined.copy_(own)
        else:
            self.under_way[region] = dist.all_gather_into_tensor(joined, own, group=self.group, async_op=True)

    def start_reduce(self, region: int, joined: torch.Tensor) -> None:
        """Begin to sum the gradients float32 [cp * S, 2, ng, hn] of a region over ranks, each keeping its own rows."""
        if self.group.size() == 1:
            self.reduced[region] = joined
            return
        own = joined.new_empty(joined.shape[0] // self.group.size(), *joined.shape[1:])
        self.reduced[region] = own
        self.under_way[region] = dist.reduce_scatter_tensor(own, joined, group=self.group, async_op=True)

    def wait(self, region: int) -> None:
        """Until what was started last for a region is there."""
        work, self.under_way[region] = self.under_way[region], None
        if work is not None:
            work.wait()


class _Send(torch.autograd.Function):
    """Starts a gather; in backward waits for the reduction that _Receive started."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, exchange: KeyValueExchange, region: int) -> torch.Tensor:
        """[S, 2, ng, hn] -> a view of it that stands for what is under way."""
        ctx.exchange, ctx.region = exchange, region
        exchange.start_gather(region, own)
        return own.view_as(own)

    @staticmethod
    def backward(ctx: Any, *stand_ins: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        """The reduced gradient, in own's precision; the incoming one only stands for it."""
        ctx.exchange.wait(ctx.region)
        gradient, ctx.exchange.reduced[ctx.region] = ctx.exchange.reduced[ctx.region], None
        return gradient.to(stand_ins[0].dtype), None, None


class _Receive(torch.autograd.Function):
    """Waits for the gathers and puts rows into pack order; in backward starts the reductions."""

    @staticmethod
    def forward(ctx: Any, exchange: KeyValueExchange, *stand_ins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, float32 [L, ng, hn]."""
        ctx.exchange, ctx.like = exchange, [(s.shape, s.dtype, s.device) for s in stand_ins]
        rows = exchange.joined()
        return rows[:, 0].float(), rows[:, 1].float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Stand-ins, never read, of the gradients that are under way."""
        exchange = ctx.exchange
        exchange.rows = None  # received for the last time
        rows = gradients[0].new_zeros(sum(exchange.joined_rows), 2, *gradients[0].shape[1:])
        rows.index_copy_(0, exchange.context.key_rows, torch.stack(gradients, dim=1))
        joined = rows.split(exchange.joined_rows)
        for region in reversed(range(len(joined))):
            exchange.start_reduce(region, joined[region])
        zero = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like)
        return None, *zero


class JointAttention(nn.Module):
    """Parameter-free attention over a pack.

    Args:
        backend: of ops.attention.
        cp_group: the context-parallel ranks that share the pack.
        recompute: run the attention again in backward instead of keeping what it saves; gathered keys and values are
            kept, so nothing is sent twice.
    """

    def __init__(self, backend: str, cp_group: dist.ProcessGroup, recompute: bool) -> None:
        super().__init__()
        self.backend, self.cp_group, self.recompute = backend, cp_group, recompute

    def exchange(self, context: PackContext, layer: int) -> KeyValueExchange:
        """What carries the keys and values of the layer with this global number."""
        return KeyValueExchange(context, self.cp_group, layer, keep=self.recompute)

    def forward(
        self, q: torch.Tensor, stand_ins: list[torch.Tensor], exchange: KeyValueExchange, context: PackContext
    ) -> torch.Tensor:
        """Rotated q [R, np, hn] and what `exchange.send` returned per region -> attended values [R, np, hn]."""

        def attend(q: torch.Tensor, *stand_ins: torch.Tensor) -> torch.Tensor:
            keys, values = exchange.receive(*stand_ins)
            return joint_attention(q.index_select(0, context.query_rows), keys, values, context.plan, self.backend)

        if self.recompute:
            out = tensor_parallel.checkpoint(attend, False, q, *stand_ins)
        else:
            out = attend(q, *stand_ins)
        padded = torch.cat([out, out.new_zeros(1, *out.shape[1:])])  # row_queries of padding points at the zero row
        return padded.index_select(0, context.row_queries)
