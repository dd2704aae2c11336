"""LM head and cross-entropy in one, a few rows at a time: logits are never whole.

Station: normed hidden states of the rows that predict a label -> [cross-entropy] -> losses.  The vocabulary is split
over tensor-parallel ranks, each of which has the same rows and labels.

Forward keeps nothing but a log-sum-exp per row; backward computes the logits of each chunk again.  To compute gradients
in forward instead would save that one product, at most 1% of a step, but hold a float32 gradient of the whole weight
until backward, and need the rows' weights in the loss beforehand.

Shapes: k rows, h hidden, v ids of this rank's shard, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def head_cross_entropy(
    rows: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    used: int,
    chunk_rows: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Cross-entropy of softmax(rows @ weight.T) over all shards, float32 [k], the same on all ranks.

    The gradient of `rows` is summed over ranks, once; that of `weight` is summed over chunks in float32.

    Args:
        rows: [k, h], the same on all ranks.
        weight: [v, h], this rank's shard, in the precision of rows.
        labels: int64 [k], ids of the whole vocabulary.
        used: ids of this shard that the tokenizer uses; the others have probability 0 and get no gradient.
        chunk_rows: rows whose logits exist at a time, c.
        group: the tensor-parallel ranks, in the order of their shards.
    """
    ce: torch.Tensor = _HeadCrossEntropy.apply(rows, weight, labels, used, chunk_rows, group)
    return ce


def head_logits(rows: torch.Tensor, weight: torch.Tensor, used: int) -> torch.Tensor:
    """Logits [k, v] of rows [k, h] over one shard [v, h], in their precision; -inf from id `used` on."""
    logits = rows @ weight.t()
    unused = torch.arange(logits.shape[-1], device=logits.device) >= used
    return logits.masked_fill(unused, float("-inf"))


def _chunks(rows: int, chunk_rows: int) -> Iterator[slice]:
    return (slice(start, start + chunk_rows) for start in range(0, rows, chunk_rows))


def _chunk_logits(rows: torch.Tensor, weight: torch.Tensor, used: int) -> torch.Tensor:
    """As head_logits in float32, in memory of its own."""
    logits = (rows @ weight.t()).float()
    logits[:, used:].fill_(float("-inf"))
    return logits


def _in_shard(labels: torch.Tensor, ids: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """(place of each label in this rank's shard of so many ids, 0 where it is in none; whether it is there)."""
    place = labels - group.rank() * ids
    here = (place >= 0) & (place < ids)
    return place.where(here, 0), here


class _HeadCrossEntropy(torch.autograd.Function):
    """See head_cross_entropy."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        used: int,
        chunk_rows: int,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        """Cross-entropy, float32 [k]; two reductions over ranks."""
        place, here = _in_shard(labels, len(weight), group)
        greatest, sums = (rows.new_empty(*size, len(rows), dtype=torch.float32) for size in ((), (2,)))
        for chunk in _chunks(len(rows), chunk_rows):
            logits = _chunk_logits(rows[chunk], weight, used)
            # where no id of the shard is used: finite, so that differences are numbers
            greatest[chunk] = logits.amax(-1).clamp_(min=torch.finfo(torch.float32).min)
            label = logits.gather(1, place[chunk, None]).squeeze(1)
            sums[1, chunk] = label.where(here[chunk], 0.0)
            sums[0, chunk] = logits.sub_(greatest[chunk, None]).exp_().sum(-1)
        shared = greatest
        if group.size() > 1:
            shared = greatest.clone()
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=group)
            sums[0] *= (greatest - shared).exp_()
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log() + shared
        ctx.save_for_backward(rows, weight, labels, log_sum)
        ctx.used, ctx.chunk_rows, ctx.group = used, chunk_rows, group
        return log_sum - sums[1]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of rows and weight, in their precision."""
        rows, weight, labels, log_sum = ctx.saved_tensors
        of_rows, of_weight = ctx.needs_input_grad[:2]
        place, here = _in_shard(labels, len(weight), ctx.group)
        d_rows = torch.empty_like(rows) if of_rows else None
        d_weight = None
        for chunk in _chunks(len(rows), ctx.chunk_rows):
            d = _chunk_logits(rows[chunk], weight, ctx.used).sub_(log_sum[chunk, None]).exp_()  # probabilities
            d.scatter_add_(1, place[chunk, None], -here[chunk, None].float())
            d = d.mul_(gradients[0][chunk, None]).to(weight.dtype)
            if d_rows is not None:
                torch.mm(d, weight, out=d_rows[chunk])
            if of_weight and len(rows) <= ctx.chunk_rows:
                d_weight = d.t() @ rows
            elif of_weight:
                d_weight = torch.zeros_like(weight, dtype=torch.float32) if d_weight is None else d_weight
                d_weight += d.t() @ rows[chunk]
            del d
        if d_rows is not None and ctx.group.size() > 1:
            dist.all_reduce(d_rows, group=ctx.group)
        return d_rows, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None
