"""Packs of steps: every sample once, within capacity, full, even in cost, the same mixture in every step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import DataConfig, ModelConfig
from megatron_lance.data.step_shape import step_shape, token_cost
from megatron_lance.data.synthetic import STAGES, stage_samples
from megatron_lance.packing.packer import deal_packs, mask_pairs
from megatron_lance.packing.step_packer import SampleCost, StepOfPacks, StepShape, pack_steps

SAMPLE = st.tuples(st.integers(1, 50), st.integers(1, 2500), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(SAMPLE, max_size=150), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), st.integers(1, 3))
def test_every_sample_is_packed_once_within_capacity(
    samples: list[SampleCost], step: tuple[int, int], bands: int
) -> None:
    shape = StepShape(60, *step, token_cost=10.0, window=8, bands=bands)
    steps = list(pack_steps(samples, shape, seed=1))
    packs = [pack for packs in steps for pack in packs]
    assert sorted(i for pack in packs for i in pack) == list(range(len(samples)))
    assert all(sum(samples[i][0] for i in pack) <= 60 for pack in packs)
    assert all(list(pack) == sorted(pack) and pack for pack in packs)
    assert steps == list(pack_steps(iter(samples), shape, seed=1))


@pytest.fixture(scope="module")
def samples() -> list[SampleCost]:
    """6,000 of CT-III: about 24 steps of 48 packs."""
    tasks = list(STAGES["ct3"].shares())
    drawn = islice(stage_samples("ct3", 5), 6000)
    return [(s.length, mask_pairs(s.segments), tasks.index(s.task)) for s in drawn]


@pytest.fixture(scope="module")
def steps(samples: list[SampleCost]) -> list[StepOfPacks]:
    """The whole steps of the recipe: 24 replicas of 2 packs."""
    shape = StepShape(80_000, 48, 24, token_cost(ModelConfig()))
    return list(pack_steps(samples, shape, seed=1))[:-1]


def costs_of(samples: list[SampleCost], step: StepOfPacks) -> list[int]:
    linear = token_cost(ModelConfig())
    return [sum(samples[i][1] + round(linear * samples[i][0]) for i in pack) for pack in step]


def test_packs_are_full(samples: list[SampleCost], steps: list[StepOfPacks]) -> None:
    assert len(steps) > 20 and all(len(step) == 48 for step in steps)
    tokens = [sum(samples[i][0] for i in pack) for step in steps for pack in step]
    assert np.mean(tokens) >= 0.995 * 80_000


@pytest.mark.parametrize(("replicas", "bound"), [(24, 1.05), (8, 1.03)])
def test_replicas_finish_together(
    samples: list[SampleCost], steps: list[StepOfPacks], replicas: int, bound: float
) -> None:
    for step in steps:
        costs = costs_of(samples, step)
        loads = [sum(costs[i] for i in dealt) for dealt in deal_packs(costs, replicas)]
        assert max(loads) <= bound * np.mean(loads)


def test_every_step_holds_the_mixture(samples: list[SampleCost], steps: list[StepOfPacks]) -> None:
    """The share of tokens of each task deviates less than that of steps in random order."""
    groups = len(STAGES["ct3"].shares())
    length, _, group = np.array(samples).T

    def deviation(parts: list[list[int]]) -> np.ndarray:
        tokens = np.array([np.bincount(group[part], length[part], groups) for part in parts])
        return (tokens / tokens.sum(1, keepdims=True)).std(0)

    order = np.random.Generator(np.random.Philox(3)).permutation(len(samples))
    at = np.cumsum(length[order]) // (48 * 80_000)
    random = [order[at == s].tolist() for s in range(int(at[-1]))]
    planned = [[i for pack in step for i in pack] for step in steps]
    assert (deviation(planned) <= 1.2 * deviation(random)).all()


def test_length_bands_even_out_packs_instead_of_steps(samples: list[SampleCost], steps: list[StepOfPacks]) -> None:
    shape = StepShape(80_000, 48, 48, token_cost(ModelConfig()), bands=4)
    banded = list(pack_steps(samples, shape, seed=1))[:-1]

    def spread(packed: list[StepOfPacks]) -> tuple[float, float]:
        """(mean of max/mean over the packs of a step, deviation of the steps' cost)."""
        costs = [costs_of(samples, step) for step in packed]
        totals = np.array([sum(step) for step in costs])
        return float(np.mean([max(step) / np.mean(step) for step in costs])), float(totals.std() / totals.mean())

    (even, other_steps), (uneven, alike) = spread(banded), spread(steps)
    assert even < 0.9 * uneven and other_steps > 5 * alike


def test_a_stream_is_packed_as_it_comes() -> None:
    """An endless stream gives steps, and what has come so far decides them."""
    read = 0

    def endless() -> Iterator[SampleCost]:
        nonlocal read
        rng = np.random.Generator(np.random.Philox(9))
        while True:
            read += 1
            length = int(rng.integers(5, 40))
            yield length, length * length, int(rng.integers(3))

    shape = StepShape(100, 4, 2, 10.0, window=32)
    first = list(islice(pack_steps(endless(), shape, seed=1), 50))
    assert all(len(step) == 4 for step in first)
    assert read < 50 * 4 * 100 / 20 + 32 * 100 / 5
    inside = sorted(i for step in first for pack in step for i in pack)
    assert len(set(inside)) == len(inside)
    held_back = set(range(inside[-1])) - set(inside)
    assert len(held_back) < 2 * 32 * 100 / 20


def test_shape_of_a_configuration() -> None:
    model = ModelConfig()
    assert token_cost(model) == pytest.approx(18816)  # 77.07 million weights of a layer and expert over 2 x 16 x 128
    assert step_shape(DataConfig(seq_length=900), model, 48) == StepShape(900, 48, 24, token_cost(model))
    assert step_shape(DataConfig(), model, 3).micro_batches == 1
    assert step_shape(DataConfig(balance_replicas=8), model, 48).micro_batches == 6
    with pytest.raises(UserError, match="data.balance_replicas 5: must divide training.global_batch_size 48"):
        step_shape(DataConfig(balance_replicas=5), model, 48)


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sample 1 of 101 tokens.*data.seq_length"):
        list(pack_steps([(5, 1, 0), (101, 1, 0)], StepShape(100, 1, 1, 1.0), 0))
    with pytest.raises(ValueError, match="4 packs to 3 replicas"):
        StepShape(100, 4, 3, 1.0)
    with pytest.raises(ValueError, match="must be positive"):
        StepShape(100, 4, 2, 1.0, bands=0)
