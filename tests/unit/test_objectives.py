"""Noise addressed by sample, timesteps and losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lance.objectives.flow_matching import draw_noise, loss_rows, shift_timestep
from megatron_lance.objectives.losses import (
    TASKS,
    LossCounts,
    sums_by_source,
    sums_by_task,
    total_loss,
    velocity_error,
    weighted_sum,
)
from megatron_lance.packing.batch import PackNoise
from megatron_lance.packing.rng import stream
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import VAE_KINDS, Segment, SegmentKind
from tests.strategies import packs

CHANNELS = 3
TARGET = Segment.visual(SegmentKind.NOISE, (2, 2, 1))


def pack_of(*samples: Sample) -> Pack:
    return Pack(samples, sum(s.length for s in samples))


def noise_of(
    pack: Pack, *, epochs: tuple[int, ...] | None = None, seed: int = 5, shift: float = 1.0, how: str = "logit_normal"
) -> PackNoise:
    chosen = epochs if epochs is not None else (0,) * len(pack.samples)
    return draw_noise(pack, chosen, CHANNELS, seed=seed, shift=shift, distribution=how)


def by_sample(pack: Pack, drawn: PackNoise) -> dict[str, tuple[list[float], list[list[float]]]]:
    """(timesteps, noise) of each sample."""
    out, at = {}, 0
    for sample in pack.samples:
        rows = slice(at, at + sample.gen_length)
        at = rows.stop
        out[sample.sample_id] = (drawn.timesteps[rows].tolist(), drawn.noise[rows].tolist())
    return out


def generation(name: str, *before: Segment) -> Sample:
    return Sample(name, Task.T2V, (*before, TARGET))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.5, 4.0])
def test_shift_formula(shift: float) -> None:
    t = torch.linspace(0, 1, 11)
    want = torch.tensor([shift * float(x) / (1 + (shift - 1) * float(x)) for x in t])
    torch.testing.assert_close(shift_timestep(t, shift), want)
    assert shift_timestep(t, shift)[[0, -1]].tolist() == [0.0, 1.0]


def test_shift_of_the_goldens() -> None:
    """A shift of 4 moves the middle to 0.8, towards noise."""
    assert float(shift_timestep(torch.tensor(0.5), 4.0)) == pytest.approx(0.8)


@settings(max_examples=40, deadline=None)
@given(packs())
def test_loss_rows_are_the_noisy_rows_that_are_no_frame_conditions(pack: Pack) -> None:
    want = []
    for placed in pack.visual_segments(*VAE_KINDS):
        t, h, w = placed.segment.grid or (0, 0, 0)
        noisy = placed.segment.kind is SegmentKind.NOISE
        want += [noisy and frame not in placed.segment.clean_frames for frame in range(t) for _ in range(h * w)]
    assert loss_rows(pack).tolist() == want
    assert sum(want) == pack.velocity_rows


@settings(max_examples=40, deadline=None)
@given(packs(), st.sampled_from(["logit_normal", "uniform"]))
def test_one_timestep_per_noise_segment_and_zero_elsewhere(pack: Pack, how: str) -> None:
    drawn, at, seen = noise_of(pack, how=how), 0, []
    assert drawn.timesteps.dtype == drawn.noise.dtype == torch.float32
    assert torch.equal(drawn.loss_rows, loss_rows(pack))
    for placed in pack.visual_segments(*VAE_KINDS):
        rows = slice(at, at + placed.segment.content_length)
        at = rows.stop
        times = set(drawn.timesteps[rows][drawn.loss_rows[rows]].tolist())
        assert not drawn.timesteps[rows][~drawn.loss_rows[rows]].any()
        assert len(times) == (1 if placed.segment.velocity_rows else 0)
        assert all(0 < t < 1 for t in times)
        seen += list(times)
        if placed.segment.kind is SegmentKind.CLEAN:
            assert not drawn.noise[rows].any()
    assert len(set(seen)) == len(seen), "segments draw on their own"


def test_noise_is_the_same_in_any_pack() -> None:
    a, b, c = (
        generation("a"),
        generation("b", Segment.text(3)),
        generation("c", Segment.visual(SegmentKind.CLEAN, (1, 1, 2))),
    )
    together = by_sample(pack_of(a, b, c), noise_of(pack_of(a, b, c)))
    for order in ([c, a, b], [b], [a, c], [c]):
        assert by_sample(pack_of(*order), noise_of(pack_of(*order))) == {
            s.sample_id: together[s.sample_id] for s in order
        }


def test_noise_differs_by_sample_epoch_segment_and_seed() -> None:
    pack = pack_of(generation("a"), generation("b"), generation("c", TARGET))
    first = noise_of(pack)
    drawn = [first, noise_of(pack, epochs=(1, 1, 1)), noise_of(pack, seed=6)]
    blocks = [d.noise[i * 4 : i * 4 + 4] for d in drawn for i in range(4)]
    times = [float(d.timesteps[i * 4]) for d in drawn for i in range(4)]
    assert len({tuple(b.flatten().tolist()) for b in blocks}) == len(set(times)) == 12
    mixed = noise_of(pack, epochs=(0, 1, 0))
    assert torch.equal(mixed.noise[:4], first.noise[:4]) and torch.equal(mixed.noise[4:8], drawn[1].noise[4:8])


def test_noise_and_timestep_ignore_the_global_generators() -> None:
    pack = pack_of(generation("a"))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = noise_of(pack)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(noise_of(pack).noise, first.noise)


def test_addresses_do_not_run_together() -> None:
    """("a", 11) is not ("a1", 1), and the number 1 is not the text "1"."""
    names: list[tuple[str | int, ...]] = [("a", 11), ("a1", 1), ("a", "11"), ("a", 1, 1), (11, "a")]
    assert len({stream(0, "noise", *name).random() for name in names}) == len(names)
    assert stream(0, "noise", "a").random() != stream(0, "timestep", "a").random()


def draws(how: str, shift: float = 1.0) -> torch.Tensor:
    """One timestep of each of 1500 samples."""
    small = Segment.visual(SegmentKind.NOISE, (1, 1, 1))
    pack = pack_of(*(Sample(f"s{i}", Task.T2I, (small,)) for i in range(1500)))
    return noise_of(pack, shift=shift, how=how).timesteps.double()


def test_logit_normal_is_the_sigmoid_of_a_standard_normal() -> None:
    u = torch.logit(draws("logit_normal"))
    assert abs(float(u.mean())) < 0.1 and abs(float(u.std()) - 1) < 0.06
    assert float((u < 0.6745).double().mean()) == pytest.approx(0.75, abs=0.04)


def test_uniform_is_uniform() -> None:
    ordered = draws("uniform").sort().values
    assert float((ordered - torch.linspace(0, 1, 1500)).abs().max()) < 0.05


@pytest.mark.parametrize("how", ["logit_normal", "uniform"])
def test_the_shift_is_applied_to_the_draw(how: str) -> None:
    torch.testing.assert_close(draws(how, 3.0), shift_timestep(draws(how), 3.0), rtol=1e-6, atol=1e-7)


def test_noise_is_standard_normal() -> None:
    big = Segment.visual(SegmentKind.NOISE, (4, 20, 20))
    values = noise_of(pack_of(Sample("s", Task.T2V, (big,)))).noise
    assert abs(float(values.mean())) < 0.05 and abs(float(values.std()) - 1) < 0.05


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match="objective.timestep_distribution 'beta': choose logit_normal or uniform"):
        noise_of(pack_of(generation("a")), how="beta")


def test_velocity_error_is_the_channel_mean_per_row() -> None:
    got = velocity_error(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]]))
    assert got.tolist() == [2.5, 0.0]
    low = velocity_error(torch.ones(1, 3, dtype=torch.bfloat16), torch.full((1, 3), 1.001))
    assert low.dtype == torch.float32 and float(low) == pytest.approx(1e-6, rel=1e-2), "the target is not rounded"


def test_weighted_sum_drops_rows_of_weight_zero() -> None:
    assert float(weighted_sum(torch.tensor([1.0, 10.0, 100.0]), torch.tensor([1.0, 0.0, 1.0]))) == 101.0


def test_sums_and_counts_by_task() -> None:
    first, second = TASKS.index(Task.T2I), TASKS.index(Task.I2T)
    per_row = torch.tensor([1.0, 10.0, 100.0], requires_grad=True)
    sums = sums_by_task(per_row, torch.tensor([1.0, 0.0, 1.0]), torch.tensor([first, first, second]))
    assert sums[first] == 1.0 and sums[second] == 100.0 and sums.sum() == 101.0 and not sums.requires_grad
    answer = Sample("q", Task.I2T, (Segment.text(6),), ((3, 6),))
    counts = LossCounts.of([pack_of(generation("a"), answer), pack_of(answer)])
    rows = generation("a").velocity_rows
    assert (counts.ce, counts.velocity) == (6, rows)
    assert {task: n for task, n in zip(TASKS, counts.by_task, strict=True) if n} == {
        generation("a").task: rows,
        Task.I2T: 6,
    }
    assert counts.by_source == {}


def test_sums_and_counts_by_source() -> None:
    per_row = torch.tensor([1.0, 10.0, 100.0, 1000.0], requires_grad=True)
    sums = sums_by_source(per_row, torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([2, 2, 0, 2]), 3)
    assert sums.tolist() == [100.0, 0.0, 1001.0] and not sums.requires_grad
    assert sums_by_source(per_row, torch.ones(4), torch.zeros(4, dtype=torch.int64), 0).shape == (0,)
    answer = Sample("q", Task.I2T, (Segment.text(6),), ((3, 6),))
    packs = [pack_of(generation("a"), answer), pack_of(answer)]
    counts = LossCounts.of(packs, [("pictures", "questions"), ("others",)])
    rows = generation("a").velocity_rows
    assert counts.by_source == {"others": 3, "pictures": rows, "questions": 3}
    more = counts.plus(LossCounts.of(packs[1:], [("questions",)]))
    assert more.by_source == {"others": 3, "pictures": rows, "questions": 6} and more.ce == 9


def test_total_loss_is_weighted_means_of_global_counts() -> None:
    ce, velocity = torch.tensor(12.0), torch.tensor(9.0)
    got = total_loss(ce, velocity, LossCounts(4, 3, ()), ce_weight=0.25, mse_weight=2.0)
    assert float(got) == pytest.approx(0.25 * 3 + 2.0 * 3)


@pytest.mark.parametrize(
    ("counts", "want"), [(LossCounts(0, 2, ()), 5.0), (LossCounts(2, 0, ()), 1.0), (LossCounts(0, 0, ()), 0.0)]
)
def test_a_loss_without_rows_is_zero_and_still_has_a_gradient(counts: LossCounts, want: float) -> None:
    ce = torch.tensor(8.0 if counts.ce else 0.0, requires_grad=True)
    velocity = torch.tensor(10.0 if counts.velocity else 0.0, requires_grad=True)
    loss = total_loss(ce, velocity, counts, ce_weight=0.25, mse_weight=1.0)
    assert float(loss.detach()) == want and math.isfinite(float(loss.detach()))
    loss.backward()
    assert ce.grad is not None and velocity.grad is not None
