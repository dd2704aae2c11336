"""Shares of parameters that are flat, as the distributed optimizer cuts them, in a checkpoint that any layout can read.

Station: optimizer's shards -> [flat_shards] -> store.  A range of a flattened tensor is a few boxes of the tensor; each
box is a sharded tensor of its own with its place in the whole, so nothing is gathered to save or to load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Box = tuple[tuple[int, int], ...]
"""(offset, size) along each dimension."""


@dataclass(frozen=True)
class FlatShard:
    """Values that belong to a range of a flattened parameter.

    Attributes:
        parameter: of this rank's model.
        start: of the range.
        data: float32 [range].
    """

    parameter: torch.nn.Parameter
    start: int
    data: torch.Tensor


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """A range of a flattened tensor as boxes, in the range's order; at most 2 x dimensions - 1.

    Args:
        shape: of the tensor, not empty.
        start: of the range, in elements.
        end: behind its last element.
    """
    if start >= end:
        return
    if len(shape) == 1:
        yield ((start, end - start),)
        return
    row = 1
    for side in shape[1:]:
        row *= side
    first, last = -(-start // row), end // row  # whole rows
    if first > last:
        yield from _in_row(shape, first - 1, start, end, row)
        return
    yield from _in_row(shape, first - 1, start, first * row, row)
    if first < last:
        yield ((first, last - first), *((0, side) for side in shape[1:]))
    yield from _in_row(shape, last, last * row, end, row)


def _in_row(shape: Sequence[int], index: int, start: int, end: int, row: int) -> Iterator[Box]:
    for box in boxes(shape[1:], start - index * row, end - index * row):
        yield ((index, 1), *box)


def sharded(shards: Sequence[FlatShard], model: Mapping[str, Any], prefix: str) -> dict[str, ShardedTensor]:
    """Shares as megatron-core saves and loads them; their data is the shares' own memory.

    Args:
        shards: of this rank; every element of the model's parameters belongs to one rank of a data-parallel group.
        model: sharded state dict of the same model, whose data are the parameters.
        prefix: of the keys in the checkpoint.
    """
    kinds = (ShardedTensor, ShardedTensorFactory)
    found, _ = extract_matching_values(dict(model), lambda value: isinstance(value, kinds))
    of_parameter = {value.data: value for value in nested_values(found)}
    result: dict[str, ShardedTensor] = {}
    for shard in shards:
        whole = of_parameter[shard.parameter]
        parts = nested_values(whole.build()) if isinstance(whole, ShardedTensorFactory) else [whole]
        for part in parts:
            for box in _boxes_of_part(shard, part, prefix):
                result[f"{len(result)}"] = box
    return result


def _boxes_of_part(shard: FlatShard, part: ShardedTensor, prefix: str) -> Iterator[ShardedTensor]:
    """What of a share lies in a part of its parameter: the parameter itself or, of gate and up, one."""
    begin = part.data.storage_offset() - shard.parameter.storage_offset()  # parts are cut along the first dimension
    start = max(shard.start, begin)
    end = min(shard.start + shard.data.numel(), begin + part.data.numel())
    at = start - shard.start
    for box in boxes(part.local_shape, start - begin, end - begin):
        sizes = tuple(size for _, size in box)
        data = shard.data[at : at + torch.Size(sizes).numel()]
        at += data.numel()
        stacked = part.prepend_axis_num
        offsets = [*part.global_offset[:stacked]]
        offsets += [place + offset for place, (offset, _) in zip(part.global_offset[stacked:], box, strict=True)]
        shape = (1,) * stacked + sizes
        yield replace(
            part,
            key=prefix + part.key,
            data=data.view(shape),
            dtype=data.dtype,
            local_shape=shape,
            global_offset=tuple(offsets),
            axis_fragmentations=None,  # boxes form no grid
            replica_id=(*part.replica_id[:-1], 0),  # the last counts data-parallel ranks, of which one holds this
            prepend_axis_num=0,
            allow_shape_mismatch=False,
        )
