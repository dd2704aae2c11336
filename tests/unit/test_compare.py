"""The comparison with goldens must not call anything equal that is not."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_lance.packing.batch import PackNoise, PackTokens, PackVisuals
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment
from megatron_lance.parity.compare import Difference, activations, gradients, relative
from megatron_lance.parity.golden import GoldenCase

NAN = torch.tensor([math.nan, 0.0])
ONES = torch.ones(2)


def case_of(
    *,
    gradients: dict[str, torch.Tensor] | None = None,
    norms: dict[str, float] | None = None,
    expected: dict[str, torch.Tensor] | None = None,
) -> GoldenCase:
    pack = Pack((Sample("s", Task.T2T, (Segment.text(2),)),), 2)
    nothing = torch.zeros(0, 1)
    return GoldenCase(
        "case",
        pack,
        PackTokens.from_ids(pack, torch.zeros(2, dtype=torch.int64)),
        PackVisuals(nothing, nothing, torch.ones(0, dtype=torch.bool)),
        PackNoise(torch.zeros(0), nothing, torch.zeros(0, dtype=torch.bool)),
        expected or {},
        gradients or {},
        norms or {},
    )


def test_relative_is_by_the_largest_entry() -> None:
    assert relative(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == pytest.approx(0.25)
    assert relative(ONES, ONES[:1]) == math.inf
    assert relative(ONES[:0], ONES[:0]) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.1e-5])
def test_no_such_value_is_ok(value: float) -> None:
    assert not Difference("q", value, 1e-5).ok


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_gradient_that_is_no_number_is_the_worst(order: tuple[str, str]) -> None:
    ours = {"a": NAN, "b": ONES}
    for case in (
        case_of(gradients={key: ONES for key in order}),
        case_of(norms={key: math.sqrt(2) for key in order}),
    ):
        (difference,) = gradients(case, ours)
        assert not difference.ok and "(worst a)" in difference.quantity


def test_the_worst_gradient_is_named() -> None:
    case = case_of(gradients={"a": ONES, "b": ONES, "c": ONES})
    (difference,) = gradients(case, {"a": ONES, "b": ONES * 1.5, "c": ONES * 1.1})
    assert difference.value == pytest.approx(0.5) and "(worst b)" in difference.quantity
    assert gradients(case_of(), {}) == []


def test_a_missing_row_is_not_ok() -> None:
    """Not even where zeros are expected."""
    case = case_of(expected={"out/packed_sequence_in": torch.tensor([[1.0, 1.0], [0.0, 0.0]])})
    full = {0: torch.ones(2), 1: torch.zeros(2)}
    for rows, ok in ((full, True), ({0: torch.ones(2)}, False), ({}, False)):
        difference, final = activations(case, {"input sequence": rows}, layers=0)
        assert not final.ok  # the final hidden state must have been recorded
        assert difference.quantity == "input sequence" and difference.ok is ok
