"""QK-norm and rotation in one pass: the compiled op on the CPU against float64 and against plain torch."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch

from megatron_lance.ops import qk_norm_mape as module
from megatron_lance.ops.mape import inverse_frequencies
from megatron_lance.ops.qk_norm_mape import FusedUnavailable, choose_backend, join, qk_norm_mape, why_not_fused
from megatron_lance.profiling.benchmarks.mape import Inputs
from tests.mape_cases import (
    DTYPES,
    EPS,
    HEAD_DIMS,
    NAMES,
    Case,
    Results,
    check,
    check_slices,
    fenced,
    truth,
    values,
    with_gradients,
)

CPU = torch.device("cpu")
fused_only = pytest.mark.skipif(bool(module._NOT_LOADED), reason=module._NOT_LOADED or "built")


def fused(case: Case, tensors: Inputs) -> Results:
    return with_gradients(case, tensors, "fused")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 33, 130])
@fused_only
def test_error_is_at_most_twice_that_of_plain_torch(rows: int, dtype: torch.dtype) -> None:
    check(Case(rows, dtype=dtype), lambda case, tensors: fused(case, fenced(tensors)), seed=rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, *HEAD_DIMS])
@fused_only
def test_every_head_size(head_dim: int, dtype: torch.dtype) -> None:
    check(Case(19, head_dim, dtype), fused, seed=head_dim)


@pytest.mark.parametrize("position", [0, 1, 1000, 65_537, 131_071, 200_000, 2**20])
@fused_only
def test_every_size_of_position(position: int) -> None:
    check(Case(37, position=position), fused)


@pytest.mark.parametrize(("heads", "taken", "offset"), [(8, 4, 0), (8, 4, 4), (4, 1, 2), (1, 1, 0), (5, 2, 3)])
@pytest.mark.parametrize("groups", [1, 3])
@fused_only
def test_some_query_heads_of_a_group(groups: int, heads: int, taken: int, offset: int) -> None:
    case = Case(21, 32, groups=groups, heads=heads, taken=taken, offset=offset)
    check(case, fused)
    d_qkv = fused(case, values(case))[2].unflatten(2, (heads + 2, 32))
    others = [h for h in range(heads) if not offset <= h < offset + taken]
    assert torch.count_nonzero(d_qkv[:, :, others]) == 0


def test_the_reference_is_right() -> None:
    """So that "twice its error" says something."""
    case = Case(33, 64, heads=4, taken=2, offset=1)
    tensors = values(case)
    for name, got, want in zip(NAMES, with_gradients(case, tensors, "reference"), truth(case, tensors), strict=True):
        assert (got.double() - want).norm() <= 3e-7 * want.norm(), name


@fused_only
def test_sine_and_cosine_are_exact_to_float32_rounding() -> None:
    """Heads of ones and of one half only give cos and sin themselves, for 600,000 angles up to 200,000."""
    rows, half = 20_000, 64
    positions = torch.linspace(0, 200_000, rows, dtype=torch.float64).to(torch.int32).expand(3, rows).contiguous()
    inv_freq = torch.cat([inverse_frequencies(2 * half, 1e6, "float32")[:32], torch.linspace(0.5, 1, 32)])
    qkv = torch.zeros(rows, 1, 3 * 2 * half)
    qkv[:, :, :half] = 1  # rms is sqrt(1/2); the weight undoes it
    weight = torch.full((2 * half,), math.sqrt(0.5))
    q, _ = qk_norm_mape(
        qkv, positions, inv_freq, weight, weight, sections=(16, 24, 24), eps=0.0, backend="fused"
    )  # fmt: skip
    angle = (positions[0, :, None].float() * inv_freq).double()
    for got, want in ((q[:, 0, :half], angle.cos()), (q[:, 0, half:], angle.sin())):
        assert (got.double() - want).abs().max() < 2.5e-7


@fused_only
def test_the_result_does_not_depend_on_threads_or_repetition() -> None:
    case = Case(333, 128, torch.bfloat16, heads=8, taken=8)
    tensors, before = values(case), torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(fused(case, tensors))
    finally:
        torch.set_num_threads(before)
    for first, second, third in zip(*runs, strict=True):
        assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@fused_only
def test_outputs_may_be_slices_of_joint_buffers(dtype: torch.dtype) -> None:
    check_slices(torch.ops.megatron_lance, Case(5, 24, dtype, heads=4, taken=2, offset=1))


@pytest.mark.parametrize("into", [False, True])
@fused_only
def test_gradients_of_what_is_asked_for_only(into: bool) -> None:
    """A frozen projection and key weight, and nothing behind k and v."""
    case = Case(9, 16)
    tensors = values(case)
    gradients: list[torch.Tensor] = []
    for backend in ("reference", "fused"):
        weight = tensors.query_weight.clone().requires_grad_()
        arguments = (*tensors.inputs[:3], weight, tensors.key_weight)
        out = torch.empty_like(tensors.d_query) if into else None
        query, _ = qk_norm_mape(*arguments, sections=case.sections, eps=EPS, backend=backend, out=out)
        gradients += torch.autograd.grad(query, weight, tensors.d_query)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("into", [False, True])
@fused_only
def test_a_second_derivative_is_refused(into: bool) -> None:
    case = Case(4, 16)
    tensors = values(case)
    qkv = tensors.qkv.clone().requires_grad_()
    out = torch.empty_like(tensors.d_query) if into else None
    query, _ = qk_norm_mape(qkv, *tensors.inputs[1:], sections=case.sections, eps=EPS, backend="fused", out=out)
    (gradient,) = torch.autograd.grad(query.sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="the fused op has no second derivative; use the reference"):
        gradient.sum().backward()


@fused_only
def test_gradients_of_any_layout_are_taken() -> None:
    """Expanded and transposed gradients, as sums and transpositions behind the op send them."""
    case = Case(9, 16)
    tensors = values(case)
    ones = torch.ones(1, 1, 1).expand_as(tensors.d_query)
    turned = tensors.d_key_value.transpose(0, 3).contiguous().transpose(0, 3)
    odd = replace(tensors, d_query=ones, d_key_value=turned)
    plain = replace(tensors, d_query=ones.contiguous())
    for a, b in zip(fused(case, odd), fused(case, plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=fused_only)])
@pytest.mark.parametrize("split", [0, 5, 9])
def test_two_regions_written_to_one_buffer_equal_one_call(backend: str, split: int) -> None:
    case = Case(9, 32, groups=2, heads=2, taken=2)
    tensors = values(case)
    want = with_gradients(case, tensors, backend)
    leaves = [x.detach().clone().requires_grad_() for x in (tensors.qkv, tensors.query_weight, tensors.key_weight)]
    buffer = torch.full((case.rows, 4, 32), math.nan)
    parts = []
    for region in (slice(0, split), slice(split, None)):
        positions, weights = tensors.positions[:, region], leaves[1:]
        parts.append(
            qk_norm_mape(leaves[0][region], positions, tensors.inv_freq, *weights, sections=case.sections, eps=EPS,
                         backend=backend, out=buffer[region])
        )  # fmt: skip
    query, key_value = join([q for q, _ in parts]), torch.cat([kv for _, kv in parts])
    assert (query.data_ptr() == buffer.data_ptr()) == (backend == "fused")
    gradients = torch.autograd.grad((query, key_value), leaves, (tensors.d_query, tensors.d_key_value))
    for name, a, b in zip(NAMES, (query, key_value, *gradients), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_join_copies_what_does_not_lie_together() -> None:
    buffer = torch.arange(12.0).reshape(6, 2)
    for parts in ([buffer[:2], buffer[3:]], [buffer[3:], buffer[:3]], [buffer[:3], torch.ones(1, 2)]):
        joined = join(parts)
        assert torch.equal(joined, torch.cat(parts)) and joined.data_ptr() != buffer.data_ptr()


def op_arguments(case: Case, requires_grad: bool) -> tuple[object, ...]:
    *tensors, query_weight, key_weight = (x.detach() for x in values(case).inputs)
    qkv = tensors[0] if case.rows else torch.zeros(tensors[0].shape)  # opcheck cannot copy an empty strided tensor
    inputs = [qkv.requires_grad_(requires_grad), *tensors[1:]]
    inputs += [w.clone().requires_grad_(requires_grad) for w in (query_weight, key_weight)]
    return *inputs, list(case.sections), case.taken, case.offset, EPS


@pytest.mark.parametrize("rows", [0, 7])
@pytest.mark.parametrize("name", ["qk_norm_mape", "qk_norm_mape_out", "qk_norm_mape_backward"])
@fused_only
def test_opcheck(name: str, rows: int) -> None:
    case = Case(rows, 16, heads=4, taken=2, offset=1)
    tensors, arguments = values(case), op_arguments(case, requires_grad=name == "qk_norm_mape")
    outputs = (torch.empty_like(tensors.d_query), torch.empty_like(tensors.d_key_value))
    if name == "qk_norm_mape_out":
        arguments = (*arguments, *outputs)
    elif name == "qk_norm_mape_backward":
        arguments = (tensors.d_query, tensors.d_key_value, *arguments)
    torch.library.opcheck(getattr(torch.ops.megatron_lance, name).default, arguments)


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=fused_only)])
def test_a_compiled_graph_is_whole(backend: str) -> None:
    """Both regions and their join in one graph, forward and backward; the graph is not lowered further."""
    case = Case(6, 16)
    tensors = values(case)
    buffer = torch.empty_like(tensors.d_query)

    def both(qkv: torch.Tensor, query_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        halves = [
            qk_norm_mape(qkv[rows], tensors.positions[:, rows], tensors.inv_freq, query_weight, tensors.key_weight,
                         sections=case.sections, eps=EPS, backend=backend, out=buffer[rows])
            for rows in (slice(0, 2), slice(2, None))
        ]  # fmt: skip
        return join([q for q, _ in halves]), torch.cat([kv for _, kv in halves])

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    results = []
    for function in (both, compiled):
        leaves = [x.detach().clone().requires_grad_() for x in (tensors.qkv, tensors.query_weight)]
        outputs = function(*leaves)
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, (tensors.d_query, tensors.d_key_value))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def wrong(**changes: object) -> dict[str, object]:
    case = Case(4, 16)
    names = ("qkv", "positions", "inv_freq", "query_weight", "key_weight")
    good = dict(zip(names, values(case).inputs, strict=True))
    return {**good, "sections": case.sections, "eps": EPS, "query_heads": 3, "backend": "reference", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": torch.zeros(4, 2, 81)}, r"qkv \[4, 2, 81\]: must be \[rows, groups, \(query heads \+ 2\) \* 16\]"),
        ({"positions": torch.zeros(3, 4)}, r"positions torch.float32 \[3, 4\]: must be int32 \[3, 4\]"),
        ({"inv_freq": torch.zeros(8).double()}, r"inv_freq torch.float64 \[8\]: must be float32"),
        ({"key_weight": torch.zeros(16).bfloat16()}, r"norm weights .*: must be torch.float32 \[16\]"),
        ({"query_weight": None, "backend": "fused"}, "norm weights None: the fused op norms; use the reference"),
        ({"sections": (1, 2, 4)}, r"sections \(1, 2, 4\): must be three counts that sum to 8"),
        ({"query_offset": 1}, r"query heads 1..4: qkv has 3 per group"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qk_norm_mape(**wrong(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.zeros(4, 2, 80).double(), "qkv must be float32, bfloat16 or float16"),
        (0, torch.zeros(5, 2, 80), "positions must be int32"),
        (3, torch.zeros(12), "head_dim 12: must be a multiple of 8 up to 256"),
        (3, torch.zeros(264), "head_dim 264"),
        (4, torch.zeros(16).half(), "key_weight must have the type"),
        (5, [8, 8, -8], "three sections that sum to 8"),
        (5, [2**63 - 1, 2**63 - 1, 10], "three sections that sum to 8"),
        (6, 4, "4 query heads from 0 on, but a group has 3"),
        (7, 2**63 - 1, f"3 query heads from {2**63 - 1} on, but a group has 3"),
    ],
)
@fused_only
def test_the_op_itself_checks_its_arguments(at: int, value: object, message: str) -> None:
    """Direct calls must not read beyond a tensor."""
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in op_arguments(Case(4, 16), False)]
    if at == 0 and value.shape[0] == 4:  # type: ignore[attr-defined]
        arguments[3:5] = [torch.zeros(16).double()] * 2
    arguments[at] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.megatron_lance.qk_norm_mape(*arguments)


def test_backend_choice(caplog: pytest.LogCaptureFixture) -> None:
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO):
        chosen = [choose_backend("auto", 128, CPU) for _ in range(3)]
    reason = why_not_fused(128, CPU)
    assert set(chosen) == {"reference" if reason else "fused"} and len(caplog.records) == 1
    assert f"QK-norm and rotation: {chosen[0]} (ops.mape = auto)" in caplog.text
    assert choose_backend("reference", 128, CPU) == "reference"
    assert choose_backend("auto", 20, CPU) == "reference"
    with pytest.raises(FusedUnavailable):
        choose_backend("fused", 20, CPU)
    with pytest.raises(ValueError, match="ops.mape 'quick': choose one of auto, fused, reference"):
        choose_backend("quick", 128, CPU)


def test_without_the_compiled_ops_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NOT_LOADED", "the compiled ops are not built; run X")
    choose_backend.cache_clear()
    assert choose_backend("auto", 128, CPU) == "reference"
    with pytest.raises(FusedUnavailable, match="the compiled ops are not built; run X"):
        choose_backend("fused", 128, CPU)
    choose_backend.cache_clear()
