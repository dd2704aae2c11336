"""The slices of a pack against the mask rule of spec/model.md section 3, token pair by token pair."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lance.packing.attention_plan import AttentionPlan, AttentionSlice, Range, merge_ranges
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from tests.strategies import packs

PROPERTY = settings(max_examples=40, deadline=None)


def mask_by_rule(pack: Pack) -> npt.NDArray[np.bool_]:
    """Section 3 word by word."""
    owner = [p for p in pack.placed_segments() for _ in range(p.segment.length)]
    mask = np.zeros((pack.length, pack.length), dtype=bool)
    for q, mine in enumerate(owner):
        for k, other in enumerate(owner):
            same_sample = mine.sample_index == other.sample_index
            same_block = same_sample and mine.segment_index == other.segment_index and mine.segment.is_visual
            foreign_noise = other.segment.kind is SegmentKind.NOISE and mine != other
            mask[q, k] = same_sample and (q >= k or same_block) and not foreign_noise
    return mask


def runs(chosen: list[bool]) -> list[Range]:
    """Ascending ranges of the true entries."""
    edges = np.flatnonzero(np.diff([0, *map(int, chosen), 0]))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def pack_of(*samples: list[Segment]) -> Pack:
    made = tuple(Sample(f"s{i}", Task.I_EDIT, tuple(segments)) for i, segments in enumerate(samples))
    return Pack(made, sum(s.length for s in made))


NOISE, CLEAN, VIT = (Segment.visual(k, (1, 1, 2)) for k in (SegmentKind.NOISE, SegmentKind.CLEAN, SegmentKind.VIT))
TEXT = Segment.text(2)


@PROPERTY
@given(packs())
def test_dense_is_the_rule(pack: Pack) -> None:
    plan = AttentionPlan.from_pack(pack)
    np.testing.assert_array_equal(plan.dense(), mask_by_rule(pack))
    assert plan.length == pack.length
    assert plan.mask_pairs == int(mask_by_rule(pack).sum())


@pytest.mark.parametrize(
    "segments",
    [
        [VIT, TEXT],
        [NOISE, TEXT],
        [NOISE, NOISE],
        [TEXT, CLEAN, NOISE, NOISE, TEXT, NOISE],
        [VIT, CLEAN, CLEAN, TEXT, TEXT, NOISE, TEXT],
        [TEXT, NOISE, TEXT, TEXT],
    ],
    ids=lambda segments: "-".join(s.kind.value for s in segments),
)
def test_named_shapes_follow_the_rule(segments: list[Segment]) -> None:
    for pack in (pack_of(segments), pack_of([TEXT], segments, segments)):
        np.testing.assert_array_equal(AttentionPlan.from_pack(pack).dense(), mask_by_rule(pack))


def test_a_small_mask_by_hand() -> None:
    """Text, a noise block, text: the last text does not see the noise, the noise sees the first text and itself."""
    pack = pack_of([TEXT, Segment.visual(SegmentKind.NOISE, (1, 1, 1)), Segment.text(1)])
    assert AttentionPlan.from_pack(pack).picture() == "\n".join(
        ["#.....", "##....", "#####.", "#####.", "#####.", "##...#"]
    )


@PROPERTY
@given(packs())
def test_slices_partition_the_queries_in_order(pack: Pack) -> None:
    slices = AttentionPlan.from_pack(pack).slices
    assert [i for s in slices for i in range(*s.query)] == list(range(pack.length))
    for piece in slices:
        keys = [i for a, b in piece.keys for i in range(a, b)]
        assert keys == sorted(set(keys)), "keys are ascending and disjoint"
        assert piece.num_keys == len(keys)
        assert all(b < c for (_, b), (c, _) in zip(piece.keys, piece.keys[1:], strict=False)), "touching ranges joined"


def test_touching_texts_share_one_slice_but_samples_do_not() -> None:
    plan = AttentionPlan.from_pack(pack_of([TEXT, TEXT, TEXT], [TEXT]))
    assert plan.slices == (AttentionSlice((0, 6), ((0, 6),), True), AttentionSlice((6, 8), ((6, 8),), True))


@PROPERTY
@given(packs(), st.data())
def test_restriction_keeps_exactly_the_chosen_rows(pack: Pack, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.booleans(), min_size=pack.length, max_size=pack.length))
    part = AttentionPlan.from_pack(pack).restrict(runs(chosen))
    want = mask_by_rule(pack) & np.array(chosen)[:, None]
    np.testing.assert_array_equal(part.dense(), want)
    assert part.mask_pairs == int(want.sum())
    assert part.length == pack.length
    assert [i for s in part.slices for i in range(*s.query)] == np.flatnonzero(chosen).tolist()


@PROPERTY
@given(packs(), st.data())
def test_a_restriction_can_be_restricted(pack: Pack, data: st.DataObject) -> None:
    bits = st.lists(st.booleans(), min_size=pack.length, max_size=pack.length)
    outer, inner = data.draw(bits), data.draw(bits)
    both = [a and b for a, b in zip(outer, inner, strict=True)]
    plan = AttentionPlan.from_pack(pack)
    twice = plan.restrict(runs(outer)).restrict(runs(both))
    np.testing.assert_array_equal(twice.dense(), plan.restrict(runs(both)).dense())


def test_restriction_to_nothing_is_empty() -> None:
    part = AttentionPlan.from_pack(pack_of([TEXT, NOISE])).restrict([])
    assert part.slices == () and part.mask_pairs == 0 and not part.dense().any()


@PROPERTY
@given(packs(), st.integers(1, 80))
def test_picture_tells_all_some_none(pack: Pack, width: int) -> None:
    mask = mask_by_rule(pack)
    lines = AttentionPlan.from_pack(pack).picture(width).split("\n")
    cells = min(width, pack.length)
    edges = [int(i * pack.length / cells) for i in range(cells)] + [pack.length]
    assert len(lines) == cells and {len(line) for line in lines} == {cells}
    for i, line in enumerate(lines):
        for j, symbol in enumerate(line):
            block = mask[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
            assert symbol == ("#" if block.all() else "+" if block.any() else ".")


def test_a_causal_slice_needs_a_key_per_query() -> None:
    AttentionSlice((0, 3), ((0, 3),), True)
    with pytest.raises(ValueError, match="causal slice of 3 queries has only 2 keys"):
        AttentionSlice((0, 3), ((0, 2),), True)
    assert AttentionSlice((0, 3), ((0, 2),), False).mask_pairs == 6


def test_merge_ranges_joins_only_neighbours() -> None:
    assert merge_ranges([(0, 2), (2, 2), (2, 5), (6, 7)]) == ((0, 5), (6, 7))
    assert merge_ranges([(3, 3)]) == ()
