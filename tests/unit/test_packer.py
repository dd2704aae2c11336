"""Packing: capacity, completeness, determinism, fill; mask pairs against a dense mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lance.packing.packer import deal_packs, mask_pairs, pack_lengths
from megatron_lance.packing.segment import Segment, SegmentKind

VISUAL = st.tuples(
    st.sampled_from([SegmentKind.VIT, SegmentKind.CLEAN, SegmentKind.NOISE]),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
SEGMENT = st.one_of(st.integers(1, 9).map(Segment.text), VISUAL.map(lambda v: Segment.visual(*v)))


def dense_pairs(segments: list[Segment]) -> int:
    """The rule of spec/model.md section 3, token by token."""
    owner = [i for i, s in enumerate(segments) for _ in range(s.length)]
    mask = np.zeros((len(owner), len(owner)), dtype=bool)
    for q, i in enumerate(owner):
        for k, j in enumerate(owner):
            same_block = i == j and segments[i].is_visual
            hidden = segments[j].kind is SegmentKind.NOISE and i != j
            mask[q, k] = (q >= k or same_block) and not hidden
    return int(mask.sum())


@settings(max_examples=100, deadline=None)
@given(st.lists(SEGMENT, min_size=1, max_size=6))
def test_mask_pairs_equal_the_dense_mask(segments: list[Segment]) -> None:
    assert mask_pairs(segments) == dense_pairs(segments)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=120), st.integers(50, 120), st.integers(1, 40))
def test_every_sample_is_packed_once_within_capacity(lengths: list[int], capacity: int, open_packs: int) -> None:
    packs = pack_lengths(lengths, capacity, open_packs)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert all(list(pack) == sorted(pack) for pack in packs)
    assert packs == pack_lengths(lengths, capacity, open_packs)


def test_fill_is_high_for_mixed_lengths() -> None:
    lengths = np.random.Generator(np.random.Philox(7)).integers(100, 12000, size=3000).tolist()
    packs = pack_lengths(lengths, 50000)
    assert sum(lengths) / (len(packs) * 50000) > 0.97


def test_a_pack_mixes_long_and_short_samples() -> None:
    """A mixture of two lengths: no pack may be of one kind, as sorting by length would make it."""
    lengths = [10 if u < 0.5 else 30 for u in np.random.Generator(np.random.Philox(8)).random(2000)]
    packs = pack_lengths(lengths, 1000)[:-16]  # the last ones are left over
    shares = [sum(lengths[i] == 10 for i in pack) / len(pack) for pack in packs]
    assert min(shares) > 0.25 and max(shares) < 0.75


def test_open_packs_must_be_positive() -> None:
    with pytest.raises(ValueError, match="open_packs 0"):
        pack_lengths([1], 10, 0)


def test_too_long_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sample 1 of 101 tokens.*data.seq_length"):
        pack_lengths([5, 101], 100)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(0, 5))
def test_packs_are_dealt_in_equal_numbers_and_nearly_equal_cost(data: st.DataObject, replicas: int, each: int) -> None:
    costs = data.draw(st.lists(st.integers(0, 100), min_size=replicas * each, max_size=replicas * each))
    dealt = deal_packs(costs, replicas)
    assert sorted(i for packs in dealt for i in packs) == list(range(len(costs)))
    assert [len(packs) for packs in dealt] == [each] * replicas
    assert all(packs == sorted(packs) for packs in dealt)
    assert dealt == deal_packs(costs, replicas)
    load = [sum(costs[i] for i in packs) for packs in dealt]
    assert max(load) - min(load) <= max(costs, default=0) - min(costs, default=0)


def test_packs_that_cannot_be_dealt_evenly_are_refused() -> None:
    assert deal_packs([4, 1, 3, 2], 2) == [[0, 1], [2, 3]]
    for costs, replicas in (([1, 2, 3], 2), ([1], 0)):
        with pytest.raises(ValueError, match="each must get the same number.*training.global_batch_size"):
            deal_packs(costs, replicas)
