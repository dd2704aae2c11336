"""The expert-sorted layout: an exact dispatch, constant rows, aligned regions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lance.packing.layout import PADDING, Layout, rows_per_rank, token_experts
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import VAE_KINDS, Expert, Segment, SegmentKind
from tests.strategies import packs

PROPERTY = settings(max_examples=40, deadline=None)
DEGREES = {"cp": st.integers(1, 5), "tp": st.sampled_from([1, 2, 4]), "alignment": st.sampled_from([1, 2, 3, 8, 16])}


def split_pack(und: int, gen: int, capacity: int) -> Pack:
    """A pack with exactly `und` and `gen` tokens; a block brings two und tokens, its markers."""
    segments = [Segment.visual(SegmentKind.NOISE, (1, 1, gen))] if gen else []
    text = und - 2 * len(segments)
    segments += [Segment.text(text)] if text else []
    return Pack((Sample("s", Task.T2I, tuple(segments)),), capacity)


def check(pack: Pack, layout: Layout, cp: int, tp: int, alignment: int) -> None:
    """Everything the other parts rely on."""
    step = alignment * tp
    assert layout.rows == rows_per_rank(pack.capacity, cp, tp, alignment)
    assert layout.tokens.shape == (cp, layout.rows)
    for rows in (layout.und_rows, layout.gen_rows):
        assert rows % step == 0 and rows >= step >= 1
    held = layout.tokens[layout.tokens != PADDING]
    assert sorted(held.tolist()) == list(range(pack.length)), "each token lies on one row"
    gen = token_experts(pack)
    for rank in range(cp):
        for expert, want, length in (
            (Expert.UND, False, pack.length - pack.gen_length),
            (Expert.GEN, True, pack.gen_length),
        ):
            region = layout.region_tokens(expert, rank)
            tokens = region[region != PADDING]
            assert (gen[tokens] == want).all(), "a region holds one expert"
            assert (region[len(tokens) :] == PADDING).all(), "padding stands behind the tokens"
            assert abs(len(tokens) - length / cp) < 1, "dealt evenly"


@PROPERTY
@given(packs(), st.fixed_dictionaries(DEGREES))
def test_layout_of_any_pack(pack: Pack, degrees: dict[str, int]) -> None:
    check(pack, Layout.build(pack, degrees["cp"], degrees["tp"], degrees["alignment"]), **degrees)


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_rows_suffice_for_every_split(cp: int) -> None:
    """Exhaustive for small capacities: no pack that fits its capacity overflows a region, all have the same rows."""
    for tp, alignment in ((1, 1), (2, 1), (1, 4), (2, 3)):
        for capacity in range(1, 17):
            for gen in range(capacity - 1):
                for und in range(2 if gen else 1, capacity - gen + 1):
                    pack = split_pack(und, gen, capacity)
                    check(pack, Layout.build(pack, cp, tp, alignment), cp, tp, alignment)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100_000), st.data(), st.fixed_dictionaries(DEGREES))
def test_rows_suffice_for_large_packs(capacity: int, data: st.DataObject, degrees: dict[str, int]) -> None:
    """The arithmetic of the regions alone."""
    step = degrees["alignment"] * degrees["tp"]
    und = data.draw(st.integers(0, capacity))
    gen = data.draw(st.integers(0, capacity - und))
    needed = sum(-(-max(1, -(-part // degrees["cp"])) // step) * step for part in (und, gen))
    rows = rows_per_rank(capacity, **degrees)
    assert needed <= rows and rows % step == 0
    assert rows <= capacity / degrees["cp"] + 3 + 2 * step, "little slack"


@PROPERTY
@given(packs())
def test_token_experts_are_the_vae_contents(pack: Pack) -> None:
    want = []
    for placed in pack.placed_segments():
        vae = placed.segment.kind in VAE_KINDS
        want += (
            [False, *[vae] * placed.segment.content_length, False]
            if placed.segment.is_visual
            else ([False] * placed.segment.length)
        )
    assert token_experts(pack).tolist() == want
    assert pack.gen_length == sum(want) and pack.length - pack.gen_length == want.count(False)


@PROPERTY
@given(packs(), st.fixed_dictionaries(DEGREES))
def test_maps_agree(pack: Pack, degrees: dict[str, int]) -> None:
    layout = Layout.build(pack, degrees["cp"], degrees["tp"], degrees["alignment"])
    joined = np.concatenate([layout.tokens[:, : layout.und_rows].ravel(), layout.tokens[:, layout.und_rows :].ravel()])
    np.testing.assert_array_equal(joined[layout.key_rows()], np.arange(pack.length))
    everything: list[int] = []
    for rank in range(degrees["cp"]):
        tokens = layout.tokens[rank][layout.query_rows(rank)]
        assert (np.diff(tokens) > 0).all(), "queries in pack order"
        ranges = layout.query_ranges(rank)
        assert [t for a, b in ranges for t in range(a, b)] == tokens.tolist()
        assert all(b < c for (_, b), (c, _) in zip(ranges, ranges[1:], strict=False)), "ranges are maximal"
        everything += tokens.tolist()
    assert sorted(everything) == list(range(pack.length))


@PROPERTY
@given(packs(), st.fixed_dictionaries(DEGREES))
def test_shards_tile_their_region(pack: Pack, degrees: dict[str, int]) -> None:
    layout, tp = Layout.build(pack, degrees["cp"], degrees["tp"], degrees["alignment"]), degrees["tp"]
    assert layout.shard_rows == (layout.und_rows // tp, layout.gen_rows // tp)
    assert all(rows % degrees["alignment"] == 0 for rows in layout.shard_rows)
    for rank in range(degrees["cp"]):
        for expert, size in zip(Expert, layout.shard_rows, strict=True):
            shards = [layout.shard_tokens(expert, rank, r) for r in range(tp)]
            assert {len(s) for s in shards} == {size}
            np.testing.assert_array_equal(np.concatenate(shards), layout.region_tokens(expert, rank))


def test_description_counts_what_it_shows() -> None:
    text = Layout.build(split_pack(10, 6, 20), 2, 1, 4).describe().split("\n")
    assert text[0] == "16 tokens on cp 2 x tp 1: 16 rows per cp rank"
    assert text[1:] == [f"  cp rank {r}: und 5/8 rows, gen 3/8 rows, padding 50.0%" for r in (0, 1)]


@PROPERTY
@given(packs(), st.fixed_dictionaries(DEGREES), st.data())
def test_a_part_of_a_pack_has_rows_for_its_tokens_alone(
    pack: Pack, degrees: dict[str, int], data: st.DataObject
) -> None:
    part = np.array(data.draw(st.lists(st.booleans(), min_size=pack.length, max_size=pack.length)))
    if not part.any():
        with pytest.raises(ValueError, match="has none of them"):
            Layout.build(pack, degrees["cp"], degrees["tp"], degrees["alignment"], part)
        return
    layout = Layout.build(pack, degrees["cp"], degrees["tp"], degrees["alignment"], part)
    held = layout.tokens[layout.tokens != PADDING]
    assert sorted(held.tolist()) == np.flatnonzero(part).tolist() == layout.held_tokens().tolist()
    joined = np.concatenate([layout.tokens[:, : layout.und_rows].ravel(), layout.tokens[:, layout.und_rows :].ravel()])
    np.testing.assert_array_equal(joined[layout.key_rows()], layout.held_tokens())
    assert layout.length == pack.length and layout.und_rows > 0 and layout.gen_rows > 0
