"""LM head and cross-entropy a few rows at a time, against whole logits; several ranks are in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from megatron_lance.ops.head_cross_entropy import head_cross_entropy, head_logits
from megatron_lance.profiling.live_bytes import LiveBytes
from tests.unit.tiny_model import one_rank

ROWS, HIDDEN, IDS, USED = 13, 16, 40, 33


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[dist.ProcessGroup]:
    with one_rank():
        assert dist.group.WORLD is not None
        yield dist.group.WORLD


def values(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weight, labels, gradients of the rows' cross-entropies; one row has none."""
    generator = torch.Generator().manual_seed(5)
    rows, weight = (torch.randn(n, HIDDEN, generator=generator).to(dtype) for n in (ROWS, IDS))
    labels, gradient = torch.randint(USED, (ROWS,), generator=generator), torch.rand(ROWS, generator=generator)
    gradient[3] = 0.0
    return rows.requires_grad_(), weight.requires_grad_(), labels, gradient


def whole(rows: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same from whole logits by torch, float32 as the logits of the op."""
    return functional.cross_entropy(head_logits(rows, weight, USED).float(), labels, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [1, 4, 13, 100])
def test_values_and_gradients_are_those_of_whole_logits(
    chunk_rows: int, dtype: torch.dtype, group: dist.ProcessGroup
) -> None:
    rows, weight, labels, gradient = values(dtype)
    want = whole(rows, weight, labels)
    wanted = torch.autograd.grad(want, (rows, weight), gradient)
    got = head_cross_entropy(rows, weight, labels, USED, chunk_rows, group)
    found = torch.autograd.grad(got, (rows, weight), gradient)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1.6e-2, "atol": 1e-3}
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, **near)  # type: ignore[arg-type]
    assert not found[1][USED:].any() and not found[0][3].any()


def test_gradients_are_those_of_finite_differences(group: dist.ProcessGroup) -> None:
    rows, weight, labels, gradient = values(torch.float32)
    got = head_cross_entropy(rows, weight, labels, USED, 4, group)
    (d_weight,) = torch.autograd.grad(got, weight, gradient)
    with torch.no_grad():
        step = torch.zeros_like(weight)
        step[labels[0]] = 1e-2
        ends = []
        for sign in (1, -1):
            logits = head_logits(rows.double(), weight.double() + sign * step, USED)
            ends.append(functional.cross_entropy(logits, labels, reduction="none") @ gradient.double())
    assert float((d_weight * step).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-3)


def test_a_frozen_weight_gets_no_gradient(group: dist.ProcessGroup) -> None:
    rows, weight, labels, gradient = values(torch.float32)
    weight.requires_grad_(False)
    head_cross_entropy(rows, weight, labels, USED, 4, group).backward(gradient)
    assert weight.grad is None and rows.grad is not None and rows.grad.any()


def test_logits_are_never_whole(group: dist.ProcessGroup) -> None:
    """1,000 rows, 4 at a time: all logits would be 1.2 MB, the peak is a few copies of the weight."""
    weight = torch.randn(300, 64, requires_grad=True)
    rows, labels = torch.randn(1000, 64, requires_grad=True), torch.randint(300, (1000,))
    with LiveBytes() as counter:
        head_cross_entropy(rows, weight, labels, 300, 4, group).sum().backward()
    assert counter.peak < 1000 * 300 * 4 / 2
