"""Positions against the rules of spec/model.md section 4, token by token, and against the golden cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lance.packing.positions import Mape, base_positions, pack_positions, sample_positions
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.parity.golden import load_case, load_config
from tests.shared import shared_path
from tests.strategies import packs, samples, visual_segments

PROPERTY = settings(max_examples=40, deadline=None)
STEP = 1000
CASES = ("case1_t2i", "case2_t2v", "case3_i2t", "case4_edit", "case6_packed", "case8_ff2v", "case15_i2t_caption")

Coordinates = list[tuple[int, int, int]]


def base_by_rule(sample: Sample) -> Coordinates:
    n, out = 0, []
    for segment in sample.segments:
        if segment.grid is None:
            out += [(n + i, n + i, n + i) for i in range(segment.length)]
            n += segment.length
            continue
        t, h, w = segment.grid
        out.append((n, n, n))
        b = n + 1
        out += [(b + 2 * i, b + j, b + k) for i in range(t) for j in range(h) for k in range(w)]
        n = b + max(2 * (t - 1), h - 1, w - 1) + 1
        out.append((n, n, n))
        n += 1
    return out


def kinds_of(sample: Sample) -> list[SegmentKind]:
    return [s.kind for s in sample.segments for _ in range(s.length)]


def where(sample: Sample, kind: SegmentKind) -> list[int]:
    return [i for i, k in enumerate(kinds_of(sample)) if k is kind]


def release_by_rule(sample: Sample) -> Coordinates:
    base = base_by_rule(sample)
    out = list(base)
    vit, clean, noise = (where(sample, k) for k in (SegmentKind.VIT, SegmentKind.CLEAN, SegmentKind.NOISE))
    for i in vit:
        out[i] = (base[i][0] - base[vit[0]][0] + 1000, *base[i][1:])
    if sample.task in (Task.S2I, Task.S2V):
        for i in clean:
            out[i] = (base[i][0] - base[clean[0]][0] + 2000, *base[i][1:])
    if sample.task in (Task.I_EDIT, Task.V_EDIT) and len(clean) == len(noise):
        for source, target in zip(clean, noise, strict=True):
            out[target] = base[source]
    return out


def paper_by_rule(sample: Sample) -> Coordinates:
    shift = {SegmentKind.TEXT: 0, SegmentKind.NOISE: 0, SegmentKind.VIT: 1000, SegmentKind.CLEAN: 2000}
    pairs = zip(base_by_rule(sample), kinds_of(sample), strict=True)
    return [(t + shift[kind], h, w) for (t, h, w), kind in pairs]


def columns(positions: np.ndarray) -> Coordinates:
    return [(int(t), int(h), int(w)) for t, h, w in positions.T]


def sample_of(task: Task, *segments: Segment) -> Sample:
    return Sample("s", task, segments)


def vit(*grid: int) -> Segment:
    return Segment.visual(SegmentKind.VIT, (grid[0], grid[1], grid[2]))


def clean(*grid: int) -> Segment:
    return Segment.visual(SegmentKind.CLEAN, (grid[0], grid[1], grid[2]))


def noise(*grid: int) -> Segment:
    return Segment.visual(SegmentKind.NOISE, (grid[0], grid[1], grid[2]))


@PROPERTY
@given(samples())
def test_base_rule(sample: Sample) -> None:
    assert columns(base_positions(sample)) == base_by_rule(sample)
    assert columns(sample_positions(sample, Mape.NONE, STEP)) == base_by_rule(sample)


def test_a_base_block_by_hand() -> None:
    """Counter 2 at the start marker; 3 frames of 1 x 2 push it to 3 + max(4, 0, 1) + 1 = 8."""
    got = columns(base_positions(sample_of(Task.T2V, Segment.text(2), noise(3, 1, 2), Segment.text(1))))
    content = [(3, 3, 3), (3, 3, 4), (5, 3, 3), (5, 3, 4), (7, 3, 3), (7, 3, 4)]
    assert got == [(0, 0, 0), (1, 1, 1), (2, 2, 2), *content, (8, 8, 8), (9, 9, 9)]


@PROPERTY
@given(samples())
def test_release_rule(sample: Sample) -> None:
    assert columns(sample_positions(sample, Mape.RELEASE, STEP)) == release_by_rule(sample)


@PROPERTY
@given(samples())
def test_paper_rule(sample: Sample) -> None:
    assert columns(sample_positions(sample, Mape.PAPER, STEP)) == paper_by_rule(sample)


@PROPERTY
@given(samples(), st.sampled_from(list(Mape)))
def test_text_is_never_moved(sample: Sample, mape: Mape) -> None:
    text = where(sample, SegmentKind.TEXT)
    np.testing.assert_array_equal(sample_positions(sample, mape, STEP)[:, text], base_positions(sample)[:, text])


@PROPERTY
@given(packs(), st.sampled_from(list(Mape)))
def test_every_sample_of_a_pack_counts_from_zero(pack: Pack, mape: Mape) -> None:
    got = pack_positions(pack, mape, STEP)
    assert got.dtype == np.int64 and got.shape == (3, pack.length)
    for start, sample in zip(pack.sample_starts, pack.samples, strict=True):
        np.testing.assert_array_equal(got[:, start : start + sample.length], sample_positions(sample, mape, STEP))


@pytest.mark.parametrize("lead", [1, 7])
def test_first_vit_marker_is_exactly_1000_and_the_others_follow(lead: int) -> None:
    sample = sample_of(Task.I2T, Segment.text(lead), vit(1, 2, 3), Segment.text(4), vit(2, 1, 1), Segment.text(2))
    base, got = base_positions(sample), sample_positions(sample, Mape.RELEASE, STEP)
    rows = where(sample, SegmentKind.VIT)
    assert got[:, rows[0]].tolist() == [1000, lead, lead]
    np.testing.assert_array_equal(got[0, rows] - base[0, rows], np.full(len(rows), 1000 - lead))
    np.testing.assert_array_equal(got[1:], base[1:])


def test_vit_block_at_the_very_start_is_moved() -> None:
    got = sample_positions(sample_of(Task.I2T, vit(1, 1, 1), Segment.text(1)), Mape.RELEASE, STEP)
    assert columns(got) == [(1000, 0, 0), (1001, 1, 1), (1002, 2, 2), (3, 3, 3)]


@pytest.mark.parametrize("task", [Task.S2I, Task.S2V])
def test_references_are_anchored_jointly_at_2000(task: Task) -> None:
    sample = sample_of(
        task, Segment.text(3), vit(1, 1, 1), clean(1, 2, 2), vit(1, 2, 1), clean(1, 1, 1), noise(1, 2, 2)
    )
    base, got = base_positions(sample), sample_positions(sample, Mape.RELEASE, STEP)
    rows = where(sample, SegmentKind.CLEAN)
    assert got[0, rows[0]] == 2000
    assert len(set((got[0, rows] - base[0, rows]).tolist())) == 1
    assert got[0, where(sample, SegmentKind.VIT)[0]] == 1000
    target = where(sample, SegmentKind.NOISE)
    np.testing.assert_array_equal(got[:, target], base[:, target])


@pytest.mark.parametrize("task", [Task.I_EDIT, Task.V_EDIT])
def test_edit_of_equal_size_copies_the_source(task: Task) -> None:
    sample = sample_of(task, vit(1, 1, 2), clean(2, 2, 3), Segment.text(5), noise(2, 2, 3), Segment.text(1))
    base, got = base_positions(sample), sample_positions(sample, Mape.RELEASE, STEP)
    source, target = where(sample, SegmentKind.CLEAN), where(sample, SegmentKind.NOISE)
    np.testing.assert_array_equal(got[:, source], base[:, source])
    np.testing.assert_array_equal(got[:, target], base[:, source])


def test_edit_compares_token_counts_not_grids() -> None:
    sample = sample_of(Task.I_EDIT, clean(1, 2, 3), Segment.text(2), noise(1, 3, 2))
    got = sample_positions(sample, Mape.RELEASE, STEP)
    np.testing.assert_array_equal(got[:, where(sample, SegmentKind.NOISE)], base_positions(sample)[:, :8])


def test_edit_of_unequal_size_changes_nothing_but_the_vit() -> None:
    sample = sample_of(Task.I_EDIT, vit(1, 1, 1), clean(1, 2, 3), Segment.text(2), noise(1, 2, 2))
    base, got = base_positions(sample), sample_positions(sample, Mape.RELEASE, STEP)
    others = [i for i, kind in enumerate(kinds_of(sample)) if kind is not SegmentKind.VIT]
    np.testing.assert_array_equal(got[:, others], base[:, others])


@PROPERTY
@given(st.sampled_from([Task.T2I, Task.T2V, Task.I2V]), visual_segments((SegmentKind.NOISE,)), st.integers(1, 9))
def test_pure_generation_is_not_shifted(task: Task, target: Segment, lead: int) -> None:
    sample = sample_of(task, Segment.text(lead), target, Segment.text(1))
    base = base_positions(sample)
    for mape in Mape:
        np.testing.assert_array_equal(sample_positions(sample, mape, STEP), base)


@PROPERTY
@given(samples(), st.sampled_from(list(Mape)))
def test_inputs_are_not_written_to(sample: Sample, mape: Mape) -> None:
    """Two calls agree, and the result may be changed by its owner."""
    first = sample_positions(sample, mape, STEP)
    want = first.copy()
    first += 1
    np.testing.assert_array_equal(sample_positions(replace(sample), mape, STEP), want)


@pytest.mark.parametrize("name", CASES)
def test_golden_positions(name: str) -> None:
    folder = shared_path("golden")
    case = load_case(folder / f"{name}.json", load_config(folder))
    base = np.concatenate([base_positions(s) for s in case.pack.samples], axis=1)
    np.testing.assert_array_equal(base, case.expected["out/position_ids_before_shift"][:, 0].numpy())
    got = pack_positions(case.pack, Mape.RELEASE, STEP)
    np.testing.assert_array_equal(got, case.expected["out/position_ids"][:, 0].numpy())
