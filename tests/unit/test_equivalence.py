"""How results of two layouts are compared: what is no number, missing or left out never counts as equal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_lance.packing.packer import deal_packs, mask_pairs
from megatron_lance.parity.equivalence import StepResult, differences, global_batches, parameter_group

KEY = "language_model.model.layers.0.self_attn.q_proj_moe_gen.weight"
STEP = StepResult(2.0, 1.0, {"t2i": 0.5}, {KEY: torch.tensor([1.0, -4.0])}, {KEY: torch.tensor([2.0, 1.0])})


def test_equal_steps_do_not_differ() -> None:
    found = differences([STEP, STEP], [STEP, STEP])
    assert found == {"loss": 0.0, "grad norm": 0.0, "loss by task": 0.0, "weights": 0.0, "gen self_attn": 0.0}
    assert parameter_group(KEY) == "gen self_attn" and parameter_group("vae2llm.bias") == "vae2llm"


def test_the_largest_relative_difference_of_all_steps_counts() -> None:
    other = replace(STEP, loss=2.2, gradients={KEY: torch.tensor([1.0, -4.4])})
    found = differences([STEP, replace(other, weights={KEY: torch.tensor([2.0, 1.1])})], [STEP, STEP])
    assert found["weights"] == pytest.approx(0.05)
    assert found["loss"] == pytest.approx(0.1) and found["gen self_attn"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"loss": math.nan}, "loss"),
        ({"grad_norm": math.nan}, "grad norm"),
        ({"by_task": {"t2i": math.nan}}, "loss by task"),
        ({"by_task": {}}, "loss by task"),
        ({"gradients": {KEY: torch.tensor([math.nan, 1.0])}}, "gen self_attn"),
        ({"gradients": {"vae2llm.bias": torch.ones(2)}}, "gen self_attn"),
        ({"weights": {KEY: torch.tensor([math.nan, 1.0])}}, "weights"),
        ({"weights": {}}, "weights"),
    ],
)
def test_what_is_no_number_or_missing_is_infinitely_far(changes: dict[str, object], name: str) -> None:
    assert differences([replace(STEP, **changes)], [STEP])[name] == math.inf  # type: ignore[arg-type]


def test_four_replicas_get_what_the_scarce_batch_promises() -> None:
    packs = [filled.pack for filled in global_batches()["scarce"]]
    dealt = deal_packs([sum(mask_pairs(s.segments) for s in pack.samples) for pack in packs], 4)
    own = [packs[numbers[0]] for numbers in dealt]
    assert sorted(len(numbers) for numbers in dealt) == [1, 1, 1, 1]
    assert any(pack.gen_length == 0 for pack in own) and any(pack.ce_rows == 0 for pack in own)
    assert any(len(pack.samples) == 1 and pack.velocity_rows for pack in own)
