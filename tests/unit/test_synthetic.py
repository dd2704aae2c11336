"""Synthetic stages: shares of the recipe, sizes within their bounds, the same each time."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from megatron_lance.data.synthetic import STAGES, stage_packs, stage_samples
from megatron_lance.packing.sample import Task
from megatron_lance.packing.segment import SegmentKind


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_shares_follow_the_recipe(stage: str) -> None:
    count = 2000
    found = Counter(sample.task for sample in islice(stage_samples(stage, 1), count))
    shares = STAGES[stage].shares()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares[Task.V2T] == pytest.approx(0.16) and shares[Task.I2T] == pytest.approx(0.04)
    for task, share in shares.items():
        assert abs(found[task] / count - share) < 0.01
    assert set(found) == set(shares)


def test_samples_keep_the_stage_s_bounds() -> None:
    samples = list(islice(stage_samples("ct3", 2), 500))
    assert max(s.length for s in samples) <= STAGES["ct3"].max_sample
    assert max(s.length for s in samples) > 60_000, "long edits are among them"
    for sample in samples:
        kinds = [s.kind for s in sample.segments if s.is_visual]
        if sample.task.is_edit:
            assert kinds == [SegmentKind.VIT, SegmentKind.CLEAN, SegmentKind.NOISE]
        for segment in sample.segments:
            if segment.kind is SegmentKind.NOISE and segment.grid:
                assert min(segment.grid[1:]) * 16 >= 480 and max(segment.grid[1:]) * 16 <= 848
        assert bool(sample.ce_rows) != bool(sample.velocity_rows)


def test_packs_are_reproducible_and_full() -> None:
    packs = stage_packs("pt", 12, seed=3)
    assert packs == stage_packs("pt", 12, seed=3) and packs != stage_packs("pt", 12, seed=4)
    assert len(packs) == 12
    assert all(pack.length >= STAGES["pt"].min_tokens for pack in packs)
