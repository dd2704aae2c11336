"""Joint attention and rotary rotation against explicit loops."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_lance.ops.attention import BACKENDS, joint_attention
from megatron_lance.ops.attention_varlen import kernel_calls
from megatron_lance.ops.mape import inverse_frequencies, rotary_angles, rotate
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from tests.shared import shared_path
from tests.strategies import packs

PROPERTY = settings(max_examples=20, deadline=None)
HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (4, 1)])
DIM = 4
ANYWHERE = [name for name, one in BACKENDS.items() if not one.why_not(torch.device("cpu"), torch.float64, DIM)]

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(queries: int, length: int, heads: tuple[int, int], dtype: torch.dtype) -> Tensors:
    """Queries [queries, hq, d], k and v [length, hkv, d], and a gradient for the output."""
    generator = torch.Generator().manual_seed(queries * 1000 + length)
    shapes = ((queries, heads[0]), (length, heads[1]), (length, heads[1]), (queries, heads[0]))
    q, k, v, grad = (torch.randn(*shape, DIM, generator=generator, dtype=dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax written out; query head h reads key/value head h // (hq / hkv)."""
    heads = []
    for h in range(q.shape[1]):
        group = h // (q.shape[1] // k.shape[1])
        scores = q[:, h] @ k[:, group].T / math.sqrt(q.shape[2])
        weights = (scores - scores.amax(1, keepdim=True)).exp() * mask
        heads.append(weights @ v[:, group] / weights.sum(1, keepdim=True))
    return torch.stack(heads, dim=1)


def with_gradients(out: torch.Tensor, inputs: Tensors) -> list[torch.Tensor]:
    q, k, v, grad = inputs
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("backend", ANYWHERE)
@PROPERTY
@given(pack=packs(max_samples=2), heads=HEADS)
def test_backend_equals_written_out_softmax(backend: str, pack: Pack, heads: tuple[int, int]) -> None:
    plan = AttentionPlan.from_pack(pack)
    inputs = tensors(pack.length, pack.length, heads, torch.float64)
    q, k, v, _ = inputs
    got = with_gradients(joint_attention(q, k, v, plan, backend), inputs)
    want = with_gradients(explicit(q, k, v, torch.from_numpy(plan.dense())), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@PROPERTY
@given(packs(), HEADS, st.data())
def test_backends_agree_on_any_part_of_the_queries(pack: Pack, heads: tuple[int, int], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.booleans(), min_size=pack.length, max_size=pack.length))
    edges = np.flatnonzero(np.diff([0, *map(int, chosen), 0])).reshape(-1, 2)
    plan = AttentionPlan.from_pack(pack).restrict([(int(a), int(b)) for a, b in edges])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        inputs = tensors(sum(chosen), pack.length, heads, dtype)
        q, k, v, _ = inputs
        results = [with_gradients(joint_attention(q, k, v, plan, name), inputs) for name in ANYWHERE]
        for got in results[1:]:
            for a, b in zip(got, results[0], strict=True):
                assert a.dtype == dtype
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ANYWHERE)
def test_no_queries_still_reach_keys_and_values(backend: str) -> None:
    """A rank without queries takes part in the gradient of the gathered keys, or the other ranks would wait."""
    q, k, v, _ = tensors(0, 3, (2, 1), torch.float32)
    out = joint_attention(q, k, v, AttentionPlan(3, ()), backend)
    assert out.shape == (0, 2, DIM)
    out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("backend", ANYWHERE)
def test_query_heads_read_their_group(backend: str) -> None:
    """Values name their key/value head; six query heads over two groups read 0 0 0 1 1 1."""
    plan = AttentionPlan.from_pack(Pack((Sample("s", Task.T2T, (Segment.text(3),)),), 3))
    q, k, _, _ = tensors(3, 3, (6, 2), torch.float32)
    v = torch.arange(2.0)[None, :, None].expand(3, 2, DIM)
    out = joint_attention(q, k, v, plan, backend)
    torch.testing.assert_close(out[:, :, 0], torch.tensor([[0.0, 0, 0, 1, 1, 1]]).expand(3, 6))


@pytest.mark.parametrize("backend", ANYWHERE)
def test_low_precision_queries_accumulate_gradients_in_the_keys_precision(backend: str) -> None:
    """Two samples' worth of slices over float32 keys: bfloat16 in and out, float32 gradients."""
    segments = (Segment.text(3), Segment.visual(SegmentKind.NOISE, (1, 2, 2)), Segment.text(2))
    pack = Pack((Sample("s", Task.T2I, segments),), 11)
    q, k, v, grad = tensors(11, 11, (2, 1), torch.float32)
    half = q.detach().bfloat16().requires_grad_()
    out = joint_attention(half, k, v, AttentionPlan.from_pack(pack), backend)
    assert out.dtype == torch.bfloat16
    out.backward(grad.bfloat16())
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    assert k.grad is not None and k.grad.dtype == torch.float32
    want = explicit(half.float(), k, v, torch.from_numpy(AttentionPlan.from_pack(pack).dense()))
    torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("lq", "lk", "lv"), [(2, 3, 3), (3, 2, 3), (3, 3, 4)])
def test_rows_that_contradict_the_plan_are_refused(lq: int, lk: int, lv: int) -> None:
    plan = AttentionPlan.from_pack(Pack((Sample("s", Task.T2T, (Segment.text(3),)),), 3))
    q, k, v = (torch.zeros(n, 1, DIM) for n in (lq, lk, lv))
    with pytest.raises(ValueError, match="the plan has 3 queries and 3 tokens"):
        joint_attention(q, k, v, plan, "sdpa")


def test_an_unknown_backend_is_refused() -> None:
    plan = AttentionPlan.from_pack(Pack((Sample("s", Task.T2T, (Segment.text(3),)),), 3))
    x = torch.zeros(3, 1, DIM)
    with pytest.raises(ValueError, match="model.attention_backend 'flash': choose one of .*'dense', 'flex', 'sdpa'"):
        joint_attention(x, x, x, plan, "flash")


@pytest.mark.parametrize(("dim", "sections"), [(16, (2, 3, 3)), (128, (16, 24, 24))])
def test_rotation_is_multiplication_by_a_unit_complex_number(dim: int, sections: tuple[int, ...]) -> None:
    """Channels j and j + d/2 are the parts of one number; frequency j follows the axis of its section."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, dim, generator=generator)
    positions = torch.tensor([[0, 1, 7, 1003, 2017], [0, 2, 5, 40, 63], [0, 3, 90, 11, 6]])
    inv_freq = inverse_frequencies(dim, 1e6, "float32")
    got = rotate(x, *rotary_angles(positions, inv_freq, sections))
    axis_of = [axis for axis, count in enumerate(sections) for _ in range(count)]
    want = torch.empty_like(x)
    for r in range(5):
        for j in range(dim // 2):
            # the angle is a float32 product, as in the reference; everything after it is exact here
            angle = float(positions[axis_of[j], r].float() * inv_freq[j])
            for n in range(2):
                z = complex(x[r, n, j], x[r, n, j + dim // 2]) * cmath.exp(1j * angle)
                want[r, n, j], want[r, n, j + dim // 2] = z.real, z.imag
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[0], x[0])


def test_rotation_depends_on_position_differences_only() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 16, generator=generator)
    inv_freq = inverse_frequencies(16, 1e4, "float32")

    def score(q_at: int, k_at: int) -> float:
        ends = (
            rotate(x, *rotary_angles(torch.full((3, 1), at), inv_freq, (2, 3, 3))) for x, at in ((q, q_at), (k, k_at))
        )
        return float(torch.mul(*ends).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rotation_keeps_the_dtype_and_computes_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 2, 16, generator=generator).bfloat16()
    angles = rotary_angles(torch.full((3, 4), 1500), inverse_frequencies(16, 1e6, "float32"), (2, 3, 3))
    got = rotate(x, *angles)
    assert got.dtype == torch.bfloat16 and angles[0].dtype == torch.float32
    assert torch.equal(got, rotate(x.float(), *angles).bfloat16())


def test_golden_rotary_tables() -> None:
    """Cosine and sine of the reference, whose three axes are selected by section in both halves."""
    recorded = load_file(shared_path("golden", "case6_packed.safetensors"))
    angles = rotary_angles(recorded["out/position_ids"][:, 0], inverse_frequencies(16, 1e6, "float32"), (2, 3, 3))
    axis_of = [0, 0, 1, 1, 1, 2, 2, 2]
    for ours, name in zip(angles, ("out/rope_cos", "out/rope_sin"), strict=True):
        theirs = recorded[name][:, 0]
        for j, axis in enumerate(axis_of):
            for column in (j, j + 8):
                torch.testing.assert_close(ours[:, j], theirs[axis, :, column], rtol=0, atol=1e-6)


def test_float32_frequencies() -> None:
    got = inverse_frequencies(128, 1e6, "float32")
    want = [1e6 ** (-2 * j / 128) for j in range(64)]
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), want, rtol=5e-7)


def test_bfloat16_frequencies_are_the_rounded_ones() -> None:
    """Eight bits of significand, nearest even; the worst of them is 2.3 rad off at position 2000."""
    exact, got = inverse_frequencies(128, 1e6, "float32"), inverse_frequencies(128, 1e6, "bfloat16")
    bits = exact.numpy().view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), rounded)
    assert float((got - exact).abs().max() * 2000) == pytest.approx(2.3, abs=0.1)
    assert got[0] == 1.0


def test_an_unknown_frequency_dtype_is_refused() -> None:
    with pytest.raises(KeyError, match="float16"):
        inverse_frequencies(16, 1e6, "float16")


def test_chunks_of_a_visual_segment_are_one_call() -> None:
    """On a context-parallel rank a segment's chunks are many slices; they share one copy of its keys."""
    noise = Segment.visual(SegmentKind.NOISE, (1, 8, 8))
    pack = Pack((Sample("s", Task.T2I, (Segment.text(9), noise, Segment.text(3))),), 100)
    plan = AttentionPlan.from_pack(pack).restrict([(0, 4), (9, 20), (30, 41), (50, 60), (76, 78)])
    assert len(plan.slices) == 5
    calls = list(kernel_calls(plan))
    assert [(queries, causal) for queries, _, causal in calls] == [(4, True), (32, False), (2, True)]
    assert calls[1][1] == plan.slices[1].keys
