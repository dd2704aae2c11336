"""QK-norm and rotation in one pass on a GPU, against float64 and against plain torch on the same GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_lance.ops.qk_norm_mape import join, qk_norm_mape, why_not_fused
from megatron_lance.profiling.benchmarks.mape import Inputs
from tests.mape_cases import DTYPES, EPS, HEAD_DIMS, Case, Results, check, check_slices, values, with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; none is present"),
    pytest.mark.skipif(
        torch.cuda.is_available() and bool(why_not_fused(128, torch.device("cuda"))),
        reason="needs the compiled ops with CUDA; build them with MEGATRON_LANCE_CUDA=1",
    ),
]


def fused(case: Case, tensors: Inputs) -> Results:
    return with_gradients(case, tensors, "fused")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 15, 16, 17, 33, 130, 4099])
def test_error_is_at_most_twice_that_of_plain_torch(rows: int, dtype: torch.dtype) -> None:
    check(Case(rows, dtype=dtype, device="cuda"), fused, seed=rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, *HEAD_DIMS])
def test_every_head_size(head_dim: int, dtype: torch.dtype) -> None:
    check(Case(35, head_dim, dtype, device="cuda"), fused, seed=head_dim)


@pytest.mark.parametrize("position", [0, 1, 1000, 65_537, 131_071, 200_000, 2**20])
def test_every_size_of_position(position: int) -> None:
    check(Case(37, position=position, device="cuda"), fused)


@pytest.mark.parametrize(("heads", "taken", "offset"), [(8, 8, 0), (8, 4, 4), (4, 1, 2), (1, 1, 0), (5, 2, 3)])
@pytest.mark.parametrize("groups", [1, 3])
def test_some_query_heads_of_a_group(groups: int, heads: int, taken: int, offset: int) -> None:
    check(Case(21, 128, torch.bfloat16, groups, heads, taken, offset, device="cuda"), fused)


def test_repetition_gives_the_same_bits() -> None:
    case = Case(5000, 128, torch.bfloat16, heads=8, taken=8, device="cuda")
    tensors = values(case)
    first = fused(case, tensors)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, fused(case, tensors), strict=True))


def test_it_runs_on_the_current_stream() -> None:
    """Work queued before and after on a side stream is ordered with it."""
    case = Case(20_000, 128, torch.bfloat16, heads=8, taken=8, device="cuda")
    tensors = values(case)
    want = fused(case, tensors)[0]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        qkv = tensors.qkv * 1
        torch.cuda._sleep(20_000_000)
        late = torch.zeros_like(qkv).copy_(qkv)
        got, _ = qk_norm_mape(late, *tensors.inputs[1:], sections=case.sections, eps=EPS, backend="fused")
    stream.synchronize()
    assert torch.equal(got, want)


def test_two_regions_written_to_one_buffer_equal_one_call() -> None:
    case = Case(40, 128, torch.bfloat16, groups=2, heads=4, taken=4, device="cuda")
    tensors = values(case)
    buffer = torch.empty_like(tensors.d_query)
    parts = [
        qk_norm_mape(
            tensors.qkv[rows],
            tensors.positions[:, rows],
            *tensors.inputs[2:],
            sections=case.sections,
            eps=EPS,
            backend="fused",
            out=buffer[rows],
        )
        for rows in (slice(0, 13), slice(13, None))
    ]
    query = join([q for q, _ in parts])
    assert query.data_ptr() == buffer.data_ptr()
    assert torch.equal(query, fused(case, tensors)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_may_be_slices_of_joint_buffers(dtype: torch.dtype) -> None:
    check_slices(torch.ops.megatron_lance, Case(5, 24, dtype, heads=4, taken=2, offset=1, device="cuda"))


def test_opcheck() -> None:
    case = Case(7, 16, torch.bfloat16, heads=4, taken=2, offset=1, device="cuda")
    inputs = [x.detach().clone() for x in values(case).inputs]
    for at in (0, 3, 4):
        inputs[at].requires_grad_()
    settings = (list(case.sections), case.taken, case.offset, EPS)
    torch.library.opcheck(torch.ops.megatron_lance.qk_norm_mape.default, (*inputs, *settings))


def test_rows_that_are_not_aligned_are_refused() -> None:
    case = Case(4, 16, torch.bfloat16, device="cuda")
    tensors = values(case)
    flat = torch.zeros(4 * 2 * 80 + 1, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(RuntimeError, match="qkv must be aligned to 16 bytes"):
        qk_norm_mape(flat[1:].view(4, 2, 80), *tensors.inputs[1:], sections=case.sections, eps=EPS, backend="fused")
