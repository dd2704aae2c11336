"""Dispatch to ranks: what all ranks hold together is exactly what was given, at the right token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.batch import PackNoise, PackTokens, PackVisuals
from megatron_lance.packing.layout import PADDING, Layout
from megatron_lance.packing.positions import Mape, pack_positions
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import VAE_KINDS, Expert, Segment, SegmentKind
from megatron_lance.parallel.dispatch import RankBatch, rank_batch
from tests.strategies import CHANNELS, HIDDEN, pack_values, packs

PROPERTY = settings(max_examples=40, deadline=None)
LAYOUTS = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.sampled_from([1, 3, 8]))
Values = tuple[PackTokens, PackVisuals, PackNoise]


def ranks(pack: Pack, layout: Layout, values: Values) -> Iterator[tuple[int, int, RankBatch]]:
    """(cp rank, tp rank, batch) of every rank."""
    for cp_rank in range(layout.cp):
        for tp_rank in range(layout.tp):
            batch = rank_batch(
                pack, layout, *values, mape=Mape.RELEASE, mape_step=1000, cp_rank=cp_rank, tp_rank=tp_rank
            )
            yield cp_rank, tp_rank, batch


def content_rows(pack: Pack, *kinds: SegmentKind) -> dict[int, tuple[int, Segment, tuple[int, int, int]]]:
    """Token -> (its row among the contents of the kinds, its segment, its cell)."""
    out: dict[int, tuple[int, Segment, tuple[int, int, int]]] = {}
    for placed in pack.visual_segments(*kinds):
        for offset, (t, h, w) in enumerate(np.ndindex(placed.segment.grid or (0, 0, 0))):
            out[placed.start + 1 + offset] = (len(out), placed.segment, (t, h, w))
    return out


def ce_of(pack: Pack, layout: Layout, values: Values, tp_rank: int = 0) -> list[tuple[int, int, float]]:
    """(token, label, weight) of all CE rows, dummies left out."""
    out = []
    for cp_rank, at, batch in ranks(pack, layout, values):
        region = layout.region_tokens(Expert.UND, cp_rank)
        rows = zip(batch.ce_rows.tolist(), batch.ce_labels.tolist(), batch.ce_weights.tolist(), strict=True)
        here = [(int(region[row]), label, weight) for row, label, weight in rows]
        held = set(region.tolist()) & set(values[0].ce_rows.tolist())
        if not held:
            assert len(here) == 1 and here[0][2] == 0.0, "one dummy row of weight zero"
        elif at == tp_rank:
            out += here
    return sorted(out)


def velocity_weights_of(pack: Pack, layout: Layout, values: Values) -> dict[int, float]:
    """Gen token -> velocity weight; padding rows must have none."""
    out = {}
    for cp_rank, tp_rank, batch in ranks(pack, layout, values):
        shard = layout.shard_tokens(Expert.GEN, cp_rank, tp_rank)
        for token, weight in zip(shard.tolist(), batch.velocity_weights.tolist(), strict=True):
            if token == PADDING:
                assert weight == 0.0
            else:
                out[token] = weight
    return out


@PROPERTY
@given(packs(), LAYOUTS)
def test_understanding_rows(pack: Pack, degrees: tuple[int, int, int]) -> None:
    layout, values = Layout.build(pack, *degrees), pack_values(pack)
    vit, seen = content_rows(pack, SegmentKind.VIT), {}
    for cp_rank, tp_rank, batch in ranks(pack, layout, values):
        region, shard = layout.region_tokens(Expert.UND, cp_rank), layout.shard_tokens(Expert.UND, cp_rank, tp_rank)
        ids = [0 if t == PADDING else int(values[0].token_ids[t]) for t in region]
        assert batch.token_ids.tolist() == ids
        rows = dict(zip(batch.vit_rows.tolist(), batch.vit, strict=True))
        for row, token in enumerate(shard.tolist()):
            assert bool(batch.text_mask[row, 0]) == (token != PADDING and token not in vit)
            assert (row in rows) == (token in vit)
            if token in vit:
                seen[token] = rows[row]
    assert seen.keys() == vit.keys()
    for token, (row, *_) in vit.items():
        assert torch.equal(seen[token], values[1].vit[row])


@PROPERTY
@given(packs(), LAYOUTS)
def test_generation_rows(pack: Pack, degrees: tuple[int, int, int]) -> None:
    layout, values = Layout.build(pack, *degrees), pack_values(pack)
    _, visuals, noise = values
    vae, seen = content_rows(pack, *VAE_KINDS), set()
    for cp_rank, tp_rank, batch in ranks(pack, layout, values):
        t_of_row = batch.timesteps[batch.timestep_index]
        assert len(set(batch.timesteps.tolist())) == len(batch.timesteps), "distinct timesteps"
        shard = layout.shard_tokens(Expert.GEN, cp_rank, tp_rank).tolist()
        assert batch.gen_mask[:, 0].tolist() == [token != PADDING for token in shard]
        for row, token in enumerate(shard):
            if token == PADDING:
                assert not batch.noisy_latents[row].any() and batch.velocity_weights[row] == 0
                continue
            seen.add(token)
            index, segment, cell = vae[token]
            t, data, eps = noise.timesteps[index], visuals.latents[index], noise.noise[index]
            target = segment.kind is SegmentKind.NOISE and cell[0] not in segment.clean_frames
            assert t_of_row[row] == t and (t > 0) == target
            assert torch.equal(batch.noisy_latents[row], (1 - t) * data + t * eps)
            assert torch.equal(batch.target[row], eps - data)
            assert batch.velocity_weights[row] == float(target)
            assert tuple(batch.grid[row].tolist()) == cell
            if not target:
                assert torch.equal(batch.noisy_latents[row], data), "clean rows and frame conditions are the data"
    assert seen == vae.keys()


@PROPERTY
@given(packs(), LAYOUTS)
def test_ce_rows(pack: Pack, degrees: tuple[int, int, int]) -> None:
    layout, values = Layout.build(pack, *degrees), pack_values(pack)
    tokens = values[0]
    want = sorted(
        (row, label, 1.0) for row, label in zip(tokens.ce_rows.tolist(), tokens.ce_labels.tolist(), strict=True)
    )
    for tp_rank in range(layout.tp):  # every tp rank holds all CE rows of its cp rank
        assert ce_of(pack, layout, values, tp_rank) == want


@PROPERTY
@given(packs(), LAYOUTS)
def test_attention_maps(pack: Pack, degrees: tuple[int, int, int]) -> None:
    """Queries, keys and positions of a rank are those of its rows; the ranks' plans together are the mask."""
    layout, values = Layout.build(pack, *degrees), pack_values(pack)
    whole, mask = pack_positions(pack, Mape.RELEASE, 1000), np.zeros((pack.length, pack.length), dtype=int)
    for cp_rank, tp_rank, batch in ranks(pack, layout, values):
        rows = layout.tokens[cp_rank]
        assert batch.region_rows == (layout.und_rows, layout.gen_rows) and batch.shard_rows == layout.shard_rows
        for row, token in enumerate(rows.tolist()):
            want = [0, 0, 0] if token == PADDING else whole[:, token].tolist()
            assert batch.positions[:, row].tolist() == want
        queries = rows[batch.query_rows.numpy()]
        assert queries.tolist() == [t for s in batch.plan.slices for t in range(*s.query)]
        for row, query in enumerate(batch.row_queries.tolist()):
            assert query == len(queries) if rows[row] == PADDING else queries[query] == rows[row]
        joined = np.concatenate([layout.region_tokens(e, r) for e in Expert for r in range(layout.cp)])
        assert joined[batch.key_rows.numpy()].tolist() == list(range(pack.length))
        mask += batch.plan.dense() if tp_rank == 0 else 0
    np.testing.assert_array_equal(mask, AttentionPlan.from_pack(pack).dense())


@PROPERTY
@given(packs(), LAYOUTS, st.data())
def test_an_unreadable_visual_silences_its_whole_sample_and_no_other(
    pack: Pack, degrees: tuple[int, int, int], data: st.DataObject
) -> None:
    layout, (tokens, visuals, noise) = Layout.build(pack, *degrees), pack_values(pack)
    count = len(visuals.valid)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    placed = [p for p in pack.placed_segments() if p.segment.is_visual]
    broken = {p.sample_index for p, ok in zip(placed, valid.tolist(), strict=True) if not ok}
    owner = [p.sample_index for p in pack.placed_segments() for _ in range(p.segment.length)]
    good, bad = (tokens, visuals, noise), (tokens, replace(visuals, valid=valid), noise)
    before = velocity_weights_of(pack, layout, good)
    want = {token: 0.0 if owner[token] in broken else weight for token, weight in before.items()}
    assert velocity_weights_of(pack, layout, bad) == want
    ce = [(row, label, 0.0 if owner[row] in broken else 1.0) for row, label, _ in ce_of(pack, layout, good)]
    assert ce_of(pack, layout, bad) == ce


@PROPERTY
@given(packs(), st.integers(1, 4))
def test_row_counts_depend_on_the_capacity_alone(pack: Pack, cp: int) -> None:
    """Other packs of the same capacity have the same rows, hence the same pipeline shapes."""
    other = Pack((Sample("other", Task.T2T, (Segment.text(1),)),), pack.capacity)
    shapes = set()
    for each in (pack, other):
        layout = Layout.build(each, cp, 2, 4)
        shapes |= {sum(batch.shard_rows) for *_, batch in ranks(each, layout, pack_values(each))}
    assert len(shapes) == 1


def test_a_frame_condition_is_clean_and_without_loss() -> None:
    target = Segment.visual(SegmentKind.NOISE, (3, 1, 2), (0, 2))
    pack = Pack((Sample("s", Task.I2V, (Segment.text(2), target)),), 10)
    _, visuals, noise = values = pack_values(pack)
    (_, _, batch), *_ = ranks(pack, Layout.build(pack, 1, 1, 1), values)
    held = batch.gen_mask[:, 0]
    times = batch.timesteps[batch.timestep_index][held]
    assert times[[0, 1, 4, 5]].tolist() == [0, 0, 0, 0] and times[2] == times[3] > 0
    assert batch.velocity_weights[held].tolist() == [0, 0, 1, 1, 0, 0]
    assert torch.equal(batch.noisy_latents[held][[0, 1, 4, 5]], visuals.latents[[0, 1, 4, 5]])
    assert not torch.equal(batch.noisy_latents[held][2:4], visuals.latents[2:4])


def test_a_given_t_and_noise_are_taken_as_they_are() -> None:
    """At t = 1 the rows are pure noise."""
    pack = Pack((Sample("s", Task.T2I, (Segment.visual(SegmentKind.NOISE, (1, 1, 3)),)),), 5)
    tokens, visuals, noise = pack_values(pack)
    explicit = replace(noise, timesteps=torch.tensor([1.0, 0.25, 0.0]), noise=torch.full((3, CHANNELS), 8.0))
    (_, _, batch), *_ = ranks(pack, Layout.build(pack, 1, 1, 1), (tokens, visuals, explicit))
    assert torch.equal(batch.noisy_latents[0], torch.full((CHANNELS,), 8.0))
    assert torch.equal(batch.noisy_latents[1], 0.75 * visuals.latents[1] + 2.0)
    assert torch.equal(batch.noisy_latents[2], visuals.latents[2])


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (2, 2)])
def test_a_given_x_t_goes_to_its_row_and_nothing_else_changes(cp: int, tp: int) -> None:
    pack = Pack((Sample("s", Task.T2V, (Segment.text(3), Segment.visual(SegmentKind.NOISE, (2, 2, 3)))),), 20)
    tokens, visuals, noise = pack_values(pack)
    x_t = torch.arange(12.0 * CHANNELS).reshape(12, CHANNELS)
    layout, vae = Layout.build(pack, cp, tp, 2), content_rows(pack, *VAE_KINDS)
    plain = ranks(pack, layout, (tokens, visuals, noise))
    given_x_t = ranks(pack, layout, (tokens, visuals, replace(noise, x_t=x_t)))
    for (cp_rank, tp_rank, before), (*_, after) in zip(plain, given_x_t, strict=True):
        shard = layout.shard_tokens(Expert.GEN, cp_rank, tp_rank).tolist()
        want = [x_t[vae[t][0]] if t != PADDING else torch.zeros(CHANNELS) for t in shard]
        assert torch.equal(after.noisy_latents, torch.stack(want))
        for name in ("target", "timesteps", "timestep_index", "velocity_weights", "grid"):
            assert torch.equal(getattr(after, name), getattr(before, name))


def test_encodings_that_contradict_the_pack_are_refused() -> None:
    pack = Pack((Sample("s", Task.I2T, (Segment.visual(SegmentKind.VIT, (1, 1, 2)),)),), 4)
    tokens, visuals, noise = pack_values(pack)
    short = replace(visuals, vit=torch.zeros(1, HIDDEN))
    with pytest.raises(ValueError, match="visuals.vit has 1 rows: the pack needs 2"):
        list(ranks(pack, Layout.build(pack, 1, 1, 1), (tokens, short, noise)))


def test_moving_to_a_device_casts_the_inputs_and_nothing_else() -> None:
    pack = Pack((Sample("s", Task.I_EDIT, (Segment.visual(SegmentKind.NOISE, (1, 2, 2)),)),), 8)
    (_, _, batch), *_ = ranks(pack, Layout.build(pack, 1, 1, 1), pack_values(pack))
    moved = batch.to(torch.device("cpu"), torch.bfloat16)
    assert moved.vit.dtype == moved.noisy_latents.dtype == torch.bfloat16
    for name in ("timesteps", "target", "velocity_weights", "ce_weights"):
        assert getattr(moved, name).dtype == torch.float32
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    for name in ("positions", "token_ids", "grid", "ce_rows"):
        assert getattr(moved, name).dtype == torch.int64
