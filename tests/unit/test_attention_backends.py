"""What the fast attention backends derive from a plan, against the dense mask; their kernels need a GPU (tests/gpu)."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex

from megatron_lance.config.loader import load_config
from megatron_lance.config.validate import validate
from megatron_lance.ops import attention_trial
from megatron_lance.ops.attention import BACKENDS, joint_attention
from megatron_lance.ops.attention_flex import (
    TILE,
    flex_attention_of,
    padded_length,
    plan_block_mask,
    plan_tables,
)
from megatron_lance.ops.attention_te import why_not_te
from megatron_lance.ops.attention_trial import (
    AttentionUnavailable,
    Heads,
    choose_attention,
    run_trial,
    trial_plan,
)
from megatron_lance.ops.attention_varlen import FlashKernel, kernel_calls, varlen_attention, varlen_calls
from megatron_lance.packing.attention_plan import AttentionPlan, AttentionSlice
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from tests.shared import REPOSITORY
from tests.strategies import packs

PROPERTY = settings(max_examples=30, deadline=None)
CPU = torch.device("cpu")


@st.composite
def plans(draw: st.DrawFn) -> AttentionPlan:
    """Of a whole pack, of a context-parallel rank, of some of its queries, also none."""
    pack = draw(packs(max_samples=3))
    kind = draw(st.sampled_from(["whole", "rank", "part"]))
    plan = AttentionPlan.from_pack(pack)
    if kind == "whole":
        return plan
    if kind == "rank":
        cp = draw(st.integers(2, 4))
        layout = Layout.build(pack, cp, 1, 1)
        return plan.restrict(layout.query_ranges(draw(st.integers(0, cp - 1))))
    chosen = draw(st.lists(st.booleans(), min_size=pack.length, max_size=pack.length))
    edges = np.flatnonzero(np.diff([0, *map(int, chosen), 0])).reshape(-1, 2)
    return plan.restrict([(int(a), int(b)) for a, b in edges])


def query_mask(plan: AttentionPlan) -> np.ndarray:
    """The dense mask's rows of the plan's queries."""
    rows = [np.arange(*piece.query) for piece in plan.slices]
    return plan.dense()[np.concatenate([np.arange(0), *rows])]


def inputs(plan: AttentionPlan, heads: tuple[int, int] = (4, 2), dim: int = 8) -> tuple[torch.Tensor, ...]:
    """q, k, v that require gradients, and a gradient."""
    queries = sum(piece.num_queries for piece in plan.slices)
    generator = torch.Generator().manual_seed(queries)
    shapes = ((queries, heads[0]), (plan.length, heads[1]), (plan.length, heads[1]), (queries, heads[0]))
    q, k, v, grad = (torch.randn(*shape, dim, generator=generator, dtype=torch.float64) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def results(plan: AttentionPlan, tensors: tuple[torch.Tensor, ...], backend: str) -> list[torch.Tensor]:
    q, k, v, grad = tensors
    out = joint_attention(q, k, v, plan, backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


# ---- varlen


@PROPERTY
@given(plans())
def test_calls_allow_the_pairs_of_the_mask(plan: AttentionPlan) -> None:
    """Every query is in at most one call, and its sequence's gathered keys are those the mask allows."""
    mask = np.zeros((sum(piece.num_queries for piece in plan.slices), plan.length), bool)
    calls = varlen_calls(plan, CPU)
    assert [call.causal for call in calls] in ([], [True], [False], [True, False])
    for call in calls:
        assert call.cu_queries.dtype == call.cu_keys.dtype == torch.int32
        assert call.max_queries == max(call.queries) and call.max_keys == max(call.keys)
        for number, (n_q, n_k) in enumerate(zip(call.queries, call.keys, strict=True)):
            rows = call.query_rows[call.cu_queries[number] : call.cu_queries[number + 1]].numpy()
            keys = call.key_tokens[call.cu_keys[number] : call.cu_keys[number + 1]].numpy()
            assert (len(rows), len(keys)) == (n_q, n_k) and not mask[rows].any()
            block = np.ones((n_q, n_k), bool)
            mask[np.ix_(rows, keys)] = np.tril(block, n_k - n_q) if call.causal else block
    np.testing.assert_array_equal(mask, query_mask(plan))


@PROPERTY
@given(plans())
def test_rounds_add_every_gathered_key_once_and_no_token_twice_in_a_round(plan: AttentionPlan) -> None:
    for call in varlen_calls(plan, CPU):
        assert sorted(torch.cat([rows for rows, _ in call.rounds]).tolist()) == list(range(len(call.key_tokens)))
        for rows, tokens in call.rounds:
            assert len(set(tokens.tolist())) == len(tokens)
            assert torch.equal(call.key_tokens[rows], tokens)


@PROPERTY
@given(plans(), st.sampled_from([(16, 2), (4, 1), (3, 3)]))
def test_emulated_calls_equal_the_dense_mask(plan: AttentionPlan, heads: tuple[int, int]) -> None:
    tensors = inputs(plan, heads)
    for a, b in zip(results(plan, tensors, "varlen_emulated"), results(plan, tensors, "dense"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_slices_of_one_range_share_its_keys() -> None:
    """On a context-parallel rank the chunks of a visual segment are one sequence with one copy of its keys."""
    noise = Segment.visual(SegmentKind.NOISE, (1, 8, 8))
    pack = Pack((Sample("s", Task.T2I, (Segment.text(9), noise, Segment.text(3))),), 100)
    plan = AttentionPlan.from_pack(pack).restrict([(0, 4), (9, 20), (30, 41), (50, 60), (76, 78)])
    causal, full = varlen_calls(plan, CPU)
    assert (causal.queries, causal.keys) == ((4, 2), (4, 12))
    assert (full.queries, full.keys) == ((32,), (75,))


@pytest.mark.parametrize("backend", ["varlen_emulated", "sdpa", "dense"])
def test_queries_without_keys_give_zeros(backend: str) -> None:
    slices = (AttentionSlice((0, 2), (), False), AttentionSlice((2, 5), ((0, 4),), True))
    plan = AttentionPlan(6, slices)
    tensors = inputs(plan)
    out, d_q, d_k, d_v = results(plan, tensors, backend)
    assert not out[:2].any() and out[2:].all() and not d_q[:2].any()
    for a, b in zip((out, d_q, d_k, d_v), results(plan, tensors, "dense"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_layers_share_what_is_derived_from_a_plan() -> None:
    plan = trial_plan(2)
    first, mask = varlen_calls(plan, CPU), plan_block_mask(plan, CPU)
    assert varlen_calls(plan, CPU) is first and plan_block_mask(plan, CPU) is mask
    again = AttentionPlan(plan.length, plan.slices)
    assert again == plan and hash(again) == hash(plan) and again.prepared == {}


def test_backward_keeps_no_gathered_keys() -> None:
    """q, keys and values of all tokens once, output: nothing that grows with the number of slices."""
    plan = trial_plan(3)
    q, k, v, _ = inputs(plan)
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        joint_attention(q, k, v, plan, "varlen_emulated")
    gathered = sum(stop - start for _, ranges, _ in kernel_calls(plan) for start, stop in ranges)
    assert gathered > 1.5 * plan.length
    assert sum(x.numel() for x in kept) == 2 * q.numel() + 2 * k.numel()


def test_cached_keys_of_another_type_serve_without_gradients() -> None:
    """As sampling hands them over: a view of a bfloat16 buffer of the whole pack, some of its queries."""
    plan = trial_plan(2).restrict([(3, 40), (60, 80)])
    q, k, _, _ = inputs(plan)
    cache = torch.stack([k.detach(), -k.detach()], dim=1).bfloat16()
    with torch.no_grad():
        a, b = (
            joint_attention(q.bfloat16(), cache[:, 0], cache[:, 1], plan, name) for name in ("varlen_emulated", "dense")
        )
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_flash_attention_is_called_as_torch_declares_it() -> None:
    """Without values (device meta): the operators take these arguments and give these shapes and types."""
    plan, meta = trial_plan(2), torch.device("meta")
    q = torch.empty(plan.length, 16, 128, dtype=torch.bfloat16, device=meta, requires_grad=True)
    k, v = (torch.empty(plan.length, 2, 128, device=meta, requires_grad=True) for _ in range(2))
    out = varlen_attention(q, k, v, plan, FlashKernel())
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in (q, k, v)]


# ---- flex


def mask_of_tables(plan: AttentionPlan, queries: int, keys: int) -> np.ndarray:
    slice_of, last_key, stretch_of, members = plan_tables(plan, queries, keys)
    return members[slice_of[:, None], stretch_of[None, :]] & (np.arange(keys)[None, :] <= last_key[:, None])


@PROPERTY
@given(plans(), st.sampled_from([1, 4, 16]))
def test_tables_and_tiles_are_the_mask(plan: AttentionPlan, tile: int) -> None:
    want = query_mask(plan)
    queries, keys = (-(-n // tile) * tile + tile for n in want.shape)
    padded = np.zeros((queries, keys), bool)
    padded[: want.shape[0], : want.shape[1]] = want
    np.testing.assert_array_equal(mask_of_tables(plan, queries, keys), padded)
    tiles = padded.reshape(queries // tile, tile, keys // tile, tile).sum((1, 3))
    np.testing.assert_array_equal(plan.tile_counts(tile, queries // tile, keys // tile), tiles)


def long_plan() -> AttentionPlan:
    """Slices that begin and end within tiles, with full, mixed and empty tiles."""
    noise, clean = (Segment.visual(kind, (1, 18, 20)) for kind in (SegmentKind.NOISE, SegmentKind.CLEAN))
    samples = (
        Sample("edit", Task.I_EDIT, (Segment.text(150), clean, Segment.text(70), noise, Segment.text(1))),
        Sample("text", Task.T2T, (Segment.text(300),)),
    )
    return AttentionPlan.from_pack(Pack(samples, 2000))


def test_block_mask_skips_empty_tiles_and_does_not_ask_in_full_ones() -> None:
    plan = long_plan()
    mask = plan_block_mask(plan, CPU)
    dense = np.zeros(mask.seq_lengths, bool)
    dense[: plan.length, : plan.length] = plan.dense()
    tiles = dense.reshape(dense.shape[0] // TILE, TILE, -1, TILE).sum((1, 3))
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    found = np.zeros_like(tiles)
    for row, (mixed, full) in enumerate(zip(mask.kv_num_blocks[0, 0], mask.full_kv_num_blocks[0, 0], strict=True)):
        found[row, mask.kv_indices[0, 0, row, :mixed]] = 1
        found[row, mask.full_kv_indices[0, 0, row, :full]] = 2
    np.testing.assert_array_equal(found, np.where(tiles == TILE * TILE, 2, np.minimum(tiles, 1)))
    assert {0, 1, 2} <= set(found.ravel().tolist())


@pytest.mark.parametrize("part", [None, [(100, 330), (500, 501), (900, 1100)]])
def test_flex_equals_dense(part: list[tuple[int, int]] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients too: torch refuses them on CPUs, but its plain version computes them once asked without the check."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    plan = long_plan() if part is None else long_plan().restrict(part)
    tensors = inputs(plan, (4, 2), 16)
    q, k, v, grad = tensors
    out = flex_attention_of(q, k, v, plan)
    got = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
    for a, b in zip(got, results(plan, tensors, "dense"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_lengths_of_one_budget_are_padded_alike() -> None:
    assert [padded_length(n) for n in (0, 1, 128, 129, 2048, 2049)] == [128, 128, 128, 256, 2048, 2304]
    assert {padded_length(n) for n in range(77_900, 80_000, 7)} == {81_920}
    assert len({padded_length(n) for n in range(32_769, 65_537)}) == 8
    assert all(n <= padded_length(n) <= 1.13 * n for n in range(1024, 90_000, 37))


def test_two_packs_share_one_compiled_graph() -> None:
    """What torch.compile guards on is the same for plans of the same padded size."""
    torch.compiler.reset()
    compiled = torch.compile(torch_flex.flex_attention, backend="eager", fullgraph=True, dynamic=False)
    one = long_plan()
    noise = Segment.visual(SegmentKind.NOISE, (1, 18, 19))
    segments = (Segment.text(77), noise, noise, Segment.text(9))
    other = AttentionPlan.from_pack(Pack((Sample("s", Task.T2V, segments), Sample("t", Task.T2V, segments[:2])), 3000))
    assert one.slices != other.slices and padded_length(one.length) == padded_length(other.length) == 1280
    torch._dynamo.utils.counters.clear()
    for plan in (one, other.restrict([(0, other.length - 5)]), replace(one)):
        mask = plan_block_mask(plan, CPU)
        q, k, v = (
            torch.randn(1, heads, length, 16)
            for heads, length in ((4, mask.seq_lengths[0]), (2, mask.seq_lengths[1]), (2, mask.seq_lengths[1]))
        )
        with torch.no_grad():
            compiled(q, k, v, block_mask=mask, enable_gqa=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- choice


def test_auto_is_plain_torch_on_a_cpu(caplog: pytest.LogCaptureFixture) -> None:
    choose_attention.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert choose_attention("auto", Heads(4, 2, 8), torch.float32, CPU) == "sdpa"
    assert caplog.text.count("joint attention: sdpa (model.attention_backend = auto): no GPU, no trial") == 1


def test_every_backend_may_be_set() -> None:
    for name in ("auto", *BACKENDS):
        validate(load_config([str(REPOSITORY / "examples/configs/tiny.yaml")], [f"model.attention_backend={name}"]), 1)


def test_a_backend_that_cannot_serve_is_refused() -> None:
    for name in ("varlen_te", "varlen_torch", "flex"):
        with pytest.raises(AttentionUnavailable, match=f"{name} needs a GPU"):
            choose_attention(name, Heads(4, 2, 8), torch.bfloat16, CPU)
    with pytest.raises(ValueError, match=r"model.attention_backend 'quick': choose one of \['auto', 'varlen_te'"):
        choose_attention("quick", Heads(4, 2, 8), torch.bfloat16, CPU)
    assert choose_attention("dense", Heads(4, 2, 8), torch.float64, CPU) == "dense"


def test_kernels_say_why_they_cannot_serve_on_a_gpu() -> None:
    gpu = torch.device("cuda", 0)
    assert "not in float32" in BACKENDS["varlen_torch"].why_not(gpu, torch.float32, 128)
    assert "head size 12" in BACKENDS["varlen_torch"].why_not(gpu, torch.bfloat16, 12)
    assert BACKENDS["varlen_torch"].why_not(gpu, torch.bfloat16, 128) == ""
    assert "below 16" in BACKENDS["flex"].why_not(gpu, torch.bfloat16, 8)
    assert BACKENDS["flex"].why_not(gpu, torch.float32, 128) == ""
    assert why_not_te(gpu, torch.float32, 128) != ""


def test_a_trial_times_what_is_right_and_says_why_not() -> None:
    trial = run_trial(
        ("varlen_te", "varlen_emulated", "sdpa", "dense"), Heads(4, 2, 8), torch.float32, CPU, trial_plan(3)
    )
    assert set(trial.milliseconds) == {"varlen_emulated", "sdpa", "dense"}
    assert trial.discarded == {"varlen_te": "needs a GPU"}
    assert trial.milliseconds[trial.fastest] == min(trial.milliseconds.values()) > 0
    assert trial.describe().endswith("ms; varlen_te not: needs a GPU")
    assert trial.describe().startswith(trial.fastest)


def test_a_trial_discards_what_is_wrong_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BACKENDS["dense"]

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        return right.attend(q, k, v, plan) * 1.1

    def fails(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    def another(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        raise TypeError("incompatible function arguments")

    monkeypatch.setitem(BACKENDS, "varlen_te", replace(right, attend=another))
    monkeypatch.setitem(BACKENDS, "flex", replace(right, attend=wrong))
    monkeypatch.setitem(BACKENDS, "varlen_torch", replace(right, attend=fails))
    names = ("flex", "varlen_te", "varlen_torch", "sdpa")
    trial = run_trial(names, Heads(2, 1, 8), torch.float32, CPU, trial_plan(2))
    assert list(trial.milliseconds) == ["sdpa"]
    assert trial.discarded["varlen_te"] == "TypeError: incompatible function arguments"
    assert trial.discarded["flex"].startswith("wrong by 0.1, 0.1, 0.1, 0.1")
    assert trial.discarded["varlen_torch"] == "RuntimeError: no kernel image"


def test_the_trial_plan_is_a_mixed_pack() -> None:
    plan = trial_plan(attention_trial.TRIAL_SIDE)
    assert 25_000 < plan.length < 40_000
    assert {piece.causal for piece in plan.slices} == {True, False}
