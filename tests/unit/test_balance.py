"""Queries dealt to context-parallel ranks: a partition, equal rows, nearly equal work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lance.data.synthetic import stage_packs
from megatron_lance.packing.attention_plan import AttentionPlan, AttentionSlice
from megatron_lance.packing.balance import MIN_CHUNK_ROWS, TILE, chunks_per_rank, deal_queries, tile_costs
from megatron_lance.packing.layout import Layout, token_experts
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from tests.strategies import packs


def experts_of(pack: Pack) -> tuple[np.ndarray, np.ndarray]:
    gen = token_experts(pack)
    return np.flatnonzero(~gen), np.flatnonzero(gen)


def tiles_by_rank(pack: Pack, cp: int) -> list[int]:
    plan, layout = AttentionPlan.from_pack(pack), Layout.build(pack, cp, 1, 1)
    return [int(tile_costs(plan.restrict(layout.query_ranges(rank))).sum()) for rank in range(cp)]


@settings(max_examples=100, deadline=None)
@given(packs(), st.integers(1, 9))
def test_every_query_is_dealt_once_and_rows_are_equal(pack: Pack, cp: int) -> None:
    experts = experts_of(pack)
    for tokens, dealt in zip(experts, deal_queries(AttentionPlan.from_pack(pack), experts, cp), strict=True):
        assert len(dealt) == cp
        assert sorted(np.concatenate(dealt).tolist()) == tokens.tolist()
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        assert all((np.diff(part) > 0).all() for part in dealt)


@pytest.mark.parametrize("cp", [2, 3, 4, 8, 16])
def test_work_of_real_sized_packs_is_nearly_equal(cp: int) -> None:
    packs_of_stage = stage_packs("ct3", 20)
    for pack in packs_of_stage:
        experts = experts_of(pack)
        for tokens, dealt in zip(experts, deal_queries(AttentionPlan.from_pack(pack), experts, cp), strict=True):
            assert sorted(np.concatenate(dealt).tolist()) == tokens.tolist()
            assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    ratios = [max(tiles) / np.mean(tiles) for tiles in (tiles_by_rank(pack, cp) for pack in packs_of_stage)]
    assert max(ratios) <= 1.10 and np.mean(ratios) <= 1.03


def test_chunks_are_long_enough_and_fill_their_tiles() -> None:
    for tokens in (1, 127, 5_000, 33_775, 67_550, 80_000):
        for cp in (2, 16, 64):
            count = chunks_per_rank(tokens, cp)
            assert count == 1 or tokens / (count * cp) >= MIN_CHUNK_ROWS
    assert chunks_per_rank(2 * 10 * 512, 2) == 20, "512 rows or 256: the most of the full ones"
    rows = 67_550 / 16
    count = chunks_per_rank(67_550, 16)
    assert count * TILE * np.ceil(rows / count / TILE) / rows < 1.04, "176 rows would waste 45%"


def test_chunks_stay_long_on_a_dealt_pack() -> None:
    """A rank's queries are a few long runs, not single rows."""
    noise = Segment.visual(SegmentKind.NOISE, (16, 16, 16))
    pack = Pack((Sample("clip", Task.T2V, (Segment.text(300), noise)),), 5000)
    gen = deal_queries(AttentionPlan.from_pack(pack), experts_of(pack), 4)[1]
    for tokens in gen:
        runs = np.split(tokens, np.flatnonzero(np.diff(tokens) != 1) + 1)
        assert min(map(len, runs)) >= MIN_CHUNK_ROWS


def test_tiles_of_a_slice() -> None:
    full = AttentionSlice((0, 129), ((0, 257),), False)  # 2 blocks of queries, 3 of keys
    causal = AttentionSlice((200, 500), ((100, 500),), True)  # 400 keys; blocks see 228, 356 and 400
    plan = AttentionPlan(500, (full, causal))
    assert tile_costs(plan).tolist() == [2 * 3, 2 + 3 + 4]
