"""Ranges of flattened tensors as boxes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lance.checkpoint.flat_shards import boxes

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(SHAPES, st.data())
def test_boxes_hold_the_range_in_its_order(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(start, whole.numel()))
    found = [whole[tuple(slice(at, at + size) for at, size in box)].flatten() for box in boxes(shape, start, end)]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *found]), torch.arange(start, end))
    assert all(len(part) for part in found) and len(found) <= 2 * len(shape) - 1
