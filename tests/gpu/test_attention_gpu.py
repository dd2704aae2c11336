"""Attention backends on a GPU, in bf16 at Lance's heads, against the dense mask in float32, forward and backward."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_lance.ops.attention import BACKENDS, joint_attention
from megatron_lance.ops.attention_flex import padded_length, plan_block_mask
from megatron_lance.ops.attention_trial import CANDIDATES, Heads, choose_attention, trial_plan
from megatron_lance.ops.attention_varlen import varlen_calls
from megatron_lance.packing.attention_plan import AttentionPlan, AttentionSlice
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; none is present"),
]
GPU = torch.device("cuda", 0)
HEADS = Heads(16, 2, 128)
TOLERANCE = 0.01  # of the norm; one rounding to bf16 is 0.002
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def pack() -> Pack:
    """Samples whose segments begin and end anywhere in a tile."""

    def visual(kind: SegmentKind, side: int) -> Segment:
        return Segment.visual(kind, (2, side, side))

    vit, clean, noise = (visual(kind, 13) for kind in (SegmentKind.VIT, SegmentKind.CLEAN, SegmentKind.NOISE))
    samples = (
        Sample("edit", Task.V_EDIT, (Segment.text(33), vit, clean, Segment.text(140), noise, Segment.text(1))),
        Sample("clip", Task.T2V, (Segment.text(150), visual(SegmentKind.NOISE, 17), Segment.text(1))),
        Sample("text", Task.T2T, (Segment.text(257),)),
    )
    return Pack(samples, sum(sample.length for sample in samples))


def rank_plan(cp: int, rank: int) -> AttentionPlan:
    layout = Layout.build(pack(), cp, 1, 8)
    return AttentionPlan.from_pack(pack()).restrict(layout.query_ranges(rank))


PLANS = {
    "pack": lambda: AttentionPlan.from_pack(pack()),
    "cp 2 rank 0": lambda: rank_plan(2, 0),
    "cp 4 rank 3": lambda: rank_plan(4, 3),
    "full": lambda: AttentionPlan(1000, (AttentionSlice((0, 1000), ((0, 1000),), False),)),
    "causal": lambda: AttentionPlan(1000, (AttentionSlice((0, 1000), ((0, 1000),), True),)),
    "bottom right": lambda: AttentionPlan(1000, (AttentionSlice((700, 1000), ((0, 300), (500, 1000)), True),)),
    "few queries": lambda: AttentionPlan.from_pack(pack()).restrict([(5, 6), (900, 903)]),
}


@pytest.fixture(params=CANDIDATES)
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if reason := BACKENDS[name].why_not(GPU, torch.bfloat16, HEADS.channels):
        pytest.skip(f"{name} {reason}")
    return name


def tensors(plan: AttentionPlan) -> Tensors:
    queries = sum(piece.num_queries for piece in plan.slices)
    generator = torch.Generator(GPU).manual_seed(plan.length)

    def normal(rows: int, heads: int) -> torch.Tensor:
        made = torch.randn(rows, heads, HEADS.channels, generator=generator, device=GPU)
        return made.bfloat16().float()  # the kernels read the same values as the truth

    q, k, v, grad = normal(queries, 16), normal(plan.length, 2), normal(plan.length, 2), normal(queries, 16)
    return q.bfloat16().requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad.bfloat16()


def results(plan: AttentionPlan, inputs: Tensors, name: str) -> list[torch.Tensor]:
    q, k, v, grad = inputs
    out = joint_attention(q, k, v, plan, name)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("name", sorted(PLANS))
def test_it_equals_the_dense_mask(backend: str, name: str) -> None:
    plan = PLANS[name]()
    inputs = tensors(plan)
    q, k, v, grad = inputs
    exact = (q.detach().float().requires_grad_(), k, v, grad.float())
    got, want = results(plan, inputs, backend), results(plan, exact, "dense")
    assert [x.dtype for x in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for quantity, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error = float((a.float() - b).norm() / b.norm())
        assert error <= TOLERANCE, f"{quantity}: {error:.4f}"


def test_nothing_waits_for_the_gpu(backend: str) -> None:
    """Once a plan is prepared, forward and backward read nothing back."""
    plan = PLANS["pack"]()
    inputs = tensors(plan)
    results(plan, inputs, backend)  # compiles kernels, uploads index tensors
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(plan, inputs, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_rank_without_queries_reaches_keys_and_values(backend: str) -> None:
    plan = AttentionPlan(64, ())
    out, d_q, d_k, d_v = results(plan, tensors(plan), backend)
    assert out.shape == d_q.shape == (0, 16, 128) and not d_k.any() and not d_v.any()


def test_preparing_does_not_wait() -> None:
    plan = PLANS["pack"]()
    torch.cuda.set_sync_debug_mode("error")
    try:
        varlen_calls(plan, GPU)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_packs_share_the_compiled_kernels_of_flex() -> None:
    one = PLANS["pack"]()
    noise = Segment.visual(SegmentKind.NOISE, (2, 13, 14))
    samples = tuple(Sample(f"s{i}", Task.T2I, (Segment.text(90 + i), noise, Segment.text(1))) for i in range(5))
    other = AttentionPlan.from_pack(Pack(samples, 10_000)).restrict([(0, one.length)])
    assert padded_length(one.length) == padded_length(other.length) and one.slices != other.slices
    results(one, tensors(one), "flex")
    torch._dynamo.utils.counters.clear()
    results(other, tensors(other), "flex")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert plan_block_mask(one, GPU).seq_lengths == plan_block_mask(other, GPU).seq_lengths


def test_backward_keeps_no_gathered_keys() -> None:
    """Peak after forward: q, keys and values in bf16, output, log-sum-exp; not the keys of every slice."""
    plan = trial_plan(12)
    name = "varlen_torch"
    inputs = tensors(plan)
    results(plan, inputs, name)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = joint_attention(*inputs[:3], plan, name)
    kept = torch.cuda.memory_allocated() - before
    rows, width = plan.length, HEADS.channels * 2
    out_and_copy, keys_and_values, statistics = 2 * rows * 16 * width, 2 * rows * 2 * width, rows * 16 * 4
    assert out.numel() and kept <= 1.1 * (out_and_copy + keys_and_values + statistics)


def test_auto_is_measured_and_said(caplog: pytest.LogCaptureFixture) -> None:
    choose_attention.cache_clear()
    with caplog.at_level(logging.INFO):
        chosen = choose_attention("auto", HEADS, torch.bfloat16, GPU)
    assert chosen in CANDIDATES
    assert f"joint attention: {chosen} (model.attention_backend = auto): {chosen} " in caplog.text
