"""The step-time model, its calibration, the planner and scaling: rules that any cluster must follow."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.config.validate import validate
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.synthetic import STAGES, scaled_packs, stage_packs, stage_samples
from megatron_lance.ops.attention_varlen import kernel_calls
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.packer import mask_pairs
from megatron_lance.profiling.cluster import RESERVED_GIB, Cluster
from megatron_lance.profiling.devices import find_device
from megatron_lance.profiling.flops import Work
from megatron_lance.profiling.plan_inputs import RECIPE_PACKS, PlanPacks, index_plan_packs
from megatron_lance.profiling.planner import Plan, Wanted, explain, plan
from megatron_lance.profiling.scaling import losses, strong_scaling, weak_scaling
from megatron_lance.profiling.step_time import PackShape, Rates, amounts_of, calibrate, load_of, predict
from megatron_lance.profiling.step_traffic import Links, Transfer
from megatron_lance.profiling.trace import EXPOSED, IDLE, PARTS
from tests.command import Commander
from tests.shared import REPOSITORY
from tests.tiny import TinyRun

RUN = load_config([str(REPOSITORY / "examples" / "configs" / "lance_3b.yaml")], [])


def shape(pairs: int) -> PackShape:
    return PackShape(Work(und=10_000, gen=65_000, pairs=pairs, ce=100, timesteps=5, squares=pairs), 1e14, 160_000)


PACKS = PlanPacks(80_000, tuple(shape(10**9 * (1 + i % 4)) for i in range(64)), "made by hand", 48)


def cluster(devices: int = 64, **changes: Any) -> Cluster:
    device = find_device("H100")
    assert device is not None
    return Cluster.of(device, devices, **changes)


def wanted(**changes: Any) -> Wanted:
    return replace(Wanted(RUN, PACKS, 48, virtual=(None, 2)), **changes)


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(wanted(), cluster(), cluster().rates())


def test_choices_fit_divide_and_are_ranked(found: Plan) -> None:
    assert found.choices and found.discarded
    rates = [choice.tokens_per_second for choice in found.choices]
    assert rates == sorted(rates, reverse=True)
    for choice in found.choices:
        validate(choice.run, 64)
        assert choice.memory_gib <= 79.1 and abs(choice.run.training.global_batch_size / 48 - 1) <= 0.2
        assert 0 < choice.mfu < 0.7
    assert {kind for kind in found.reasons()} == {"does not fit in memory", "does not divide", "packs per step"}
    nearest = min(discarded.missing_gib for discarded in found.discarded if "fit" in discarded.kind)
    assert nearest > 0 and f"needs {79.1 + nearest:.0f} GiB" in found.reasons()["does not fit in memory"][1]


def test_overrides_give_the_chosen_layout(found: Plan) -> None:
    choice = found.choices[0]
    again = load_config([str(REPOSITORY / "examples" / "configs" / "lance_3b.yaml")], choice.overrides())
    assert again.parallel.context_parallel_size == choice.degrees["cp"]
    assert again.parallel.recompute_granularity == choice.run.parallel.recompute_granularity
    assert again.training.global_batch_size == choice.run.training.global_batch_size


def test_the_explanation_names_winner_and_what_others_spend(found: Plan) -> None:
    lines = explain(found, runners_up=3)
    assert lines[0].startswith(found.choices[0].name) and len(lines) == 4
    assert all("slower" in line for line in lines[1:])
    nothing = plan(wanted(), cluster(memory_gib=8.0), cluster().rates())
    assert not nothing.choices and "no layout fits" in explain(nothing)[0]


def test_less_memory_and_slower_links_change_the_choice(found: Plan) -> None:
    small = plan(wanted(), cluster(memory_gib=40.0), cluster().rates())
    assert len(small.choices) < len(found.choices)
    assert all(choice.memory_gib <= 40.0 for choice in small.choices)
    slow = cluster(network_bandwidth=1e9)
    slowed = plan(wanted(), slow, slow.rates())
    assert slowed.choices[0].tokens_per_second < found.choices[0].tokens_per_second
    assert slowed.choices[0].memory_gib > RESERVED_GIB


def test_fp8_stands_beside_bf16(found: Plan) -> None:
    both = plan(wanted(fp8=True), cluster(), cluster().rates())
    assert len(both.choices) == 2 * len(found.choices) and both.choices[0].fp8
    run = load_config([str(REPOSITORY / "examples" / "configs" / "lance_3b.yaml")], both.choices[0].overrides())
    assert run.fp8.recipe != "none"
    validate(run, 64)
    shown = {(tuple(choice.degrees.values()), choice.fp8) for choice in both.best_by_degrees()}
    assert {(degrees, not fp8) for degrees, fp8 in shown} == shown, "both precisions of every layout"
    assert explain(both)[-1].startswith("FP8: linears 1.4 times as fast, which is assumed")
    narrow = replace(RUN, model=replace(RUN.model, ffn_hidden_size=11_000))
    assert plan(wanted(run=narrow, fp8=True), cluster(), cluster().rates()).reasons()["not in FP8"][0] > 0
    assert both.choices[0].time.parts["linears"] < found.choices[0].time.parts["linears"]


def configured(world: int, packs: int = 8, **parallel: Any) -> RunConfig:
    run = replace(
        RUN, data=replace(RUN.data, seq_length=80_000), training=replace(RUN.training, global_batch_size=packs)
    )
    run = replace(run, parallel=replace(run.parallel, recompute_granularity=None, **parallel))
    validate(run, world)
    return run


def seconds(run: RunConfig, world: int, packs: list[PackShape], deal: Any, rates: Rates | None = None) -> Any:
    return predict(run, world, rates or cluster(world).rates(), packs, deal)


def test_a_step_waits_for_the_replica_with_more_work() -> None:
    run, packs = configured(8, packs=2, context_parallel_size=4), [shape(10**9), shape(3 * 10**9)]
    even = seconds(run, 8, [packs[0], packs[0]], [[[0], [1]]])
    uneven = seconds(run, 8, packs, [[[0], [1]]])
    assert even.parts["waiting for replicas"] == pytest.approx(0)
    assert uneven.parts["waiting for replicas"] > 0 and uneven.seconds > even.seconds


def test_a_pipeline_bubble_shrinks_with_packs_and_virtual_stages() -> None:
    packs = [shape(10**9)] * 8
    degrees = {"pipeline_model_parallel_size": 4, "context_parallel_size": 2}
    few = seconds(configured(8, packs=4, **degrees), 8, packs, [[[0, 1, 2, 3]]])
    many = seconds(configured(8, packs=8, **degrees), 8, packs, [[list(range(8))]])
    virtual = configured(8, packs=4, virtual_pipeline_model_parallel_size=3, **degrees)
    assert few.parts["bubble"] / few.seconds > many.parts["bubble"] / many.seconds > 0
    assert seconds(virtual, 8, packs, [[[0, 1, 2, 3]]]).parts["bubble"] == pytest.approx(
        few.parts["bubble"] / 3, rel=0.1
    )


def test_what_is_recomputed_is_paid_for() -> None:
    run = configured(8, context_parallel_size=8)
    full = replace(run, parallel=replace(run.parallel, recompute_granularity="full"))
    work = Work(und=1000, gen=9000, pairs=10**8, ce=5, timesteps=1)
    plain, again = (amounts_of(each, 8, 0, work, 1) for each in (run, full))
    assert again.linears == pytest.approx(4 / 3 * plain.linears)
    assert again.attention == pytest.approx(4 / 3 * plain.attention)
    assert again.elementwise > plain.elementwise and again.optimizer == plain.optimizer


def profile(known: Rates, transfers: list[Transfer], slows: float = 1.0, nodes: int = 1) -> dict[str, Any]:
    """A profile of two ranks, written by formula with known rates."""
    amounts = amounts_of(configured(8, context_parallel_size=8), 8, 0, Work(1000, 9000, 10**8, 50, 3), 1)
    parts = dict.fromkeys((*PARTS, EXPOSED, IDLE), 0.0)
    parts["linears und"] = amounts.linears / known.linears
    parts["attention"] = amounts.attention / known.attention
    parts["heads"] = amounts.heads / known.heads
    parts["mape"] = amounts.elementwise / known.elementwise
    parts["optimizer"] = amounts.optimizer / known.optimizer
    parts[IDLE] = amounts.passes * known.pass_seconds
    parts[EXPOSED] = sum(known.links.seconds(transfer) for transfer in transfers)
    sent = [asdict(transfer) for transfer in transfers]
    rank = {
        "parts": {name: slows * seconds for name, seconds in parts.items()},
        "amounts": asdict(amounts),
        "transfers": sent,
        "encoder_flops": 0.0,
    }
    ranks = [{**rank, "node": i % nodes} for i in range(2)]
    return {"device": "cpu", "profiler_slows": slows, "ranks": ranks}


def gathers(ranks: int, *sizes: float) -> list[list[Transfer]]:
    """Per profile one kind of gather; calls grow otherwise than bytes."""
    return [[Transfer("x", "cp", ranks, 1, round(10 * (1 + i) ** 2), size)] for i, size in enumerate(sizes)]


def test_calibration_finds_the_rates_that_made_profiles() -> None:
    """Whatever the profiler itself takes, and links between nodes that no profile used stay published ones."""
    known = replace(cluster().rates(), links=Links(2, 5e9, 1e9, 2e-4, 3e-3), host_ahead=False)
    base = cluster().rates()
    within = [profile(known, sent, slows) for sent, slows in zip(gathers(2, 1e8, 3e8), (1.0, 1.5), strict=True)]
    found = calibrate(within, base)
    for name in ("linears", "attention", "heads", "elementwise", "optimizer", "pass_seconds"):
        assert getattr(found, name) == pytest.approx(getattr(known, name)), name
    assert found.links.node_bandwidth == pytest.approx(5e9) and found.links.node_latency == pytest.approx(2e-4)
    assert found.links.network_bandwidth == base.links.network_bandwidth
    assert found.links.network_latency == base.links.network_latency
    assert found.encoders == base.encoders and not found.host_ahead
    between = [
        profile(replace(known, links=Links(1, 5e9, 1e9, 2e-4, 3e-3)), sent, nodes=2) for sent in gathers(2, 1e8, 3e8)
    ]
    links = calibrate(between, base).links
    assert links.network_bandwidth == pytest.approx(1e9) and links.network_latency == pytest.approx(3e-3)
    assert (links.node_bandwidth, links.node_latency) == (base.links.node_bandwidth, base.links.node_latency)


def test_losses_grow_with_devices_and_stalls() -> None:
    small, large, slow = losses(2.0, 64), losses(2.0, 16384), losses(20.0, 16384)
    assert 1 > small.goodput > large.goodput > slow.goodput > 0.5
    assert small.interval_seconds > large.interval_seconds
    worse = losses(2.0, 16384, hours=5000)
    assert worse.goodput < large.goodput


def test_weak_scaling_keeps_packs_per_replica_and_strong_the_step(found: Plan) -> None:
    choice = found.choices[0]
    weak = weak_scaling(choice, wanted(), cluster(), cluster().rates())
    assert weak[-1].devices == 16384
    assert {p.choice.run.training.global_batch_size // p.choice.degrees["dp"] for p in weak} == {choice.micro_batches}
    per_device = [p.tokens_per_second / p.devices for p in weak]
    assert per_device[-1] < per_device[0]
    strong = strong_scaling(wanted(), cluster(), cluster().rates(), sizes=(64, 1024))
    assert all(abs(p.choice.run.training.global_batch_size / 48 - 1) <= 0.2 for p in strong)
    assert strong[-1].choice.mfu < strong[0].choice.mfu
    assert set(strong[0].record()) >= {"devices", "layout", "goodput", "bubble", "waiting_for_replicas"}


def test_packs_are_dealt_evenly_and_the_same_every_time() -> None:
    deal = PACKS.deal(replicas=8, micro_batches=12, steps=2)
    assert deal == PACKS.deal(8, 12, 2)
    assert [len(step) for step in deal] == [8, 8] and {len(part) for step in deal for part in step} == {12}
    assert set(RECIPE_PACKS) == set(STAGES)


@pytest.mark.parametrize("stage", ["pt", "ct3"])
def test_memory_is_planned_for_the_keys_that_the_worst_rank_copies(stage: str) -> None:
    """Of every pack on its own degrees, not a guess: long edits copy keys almost three times."""
    packs = stage_packs(stage, 6, seed=0)
    shapes = [PackShape.of(pack) for pack in packs]
    run = configured(8, context_parallel_size=8)
    planned = load_of(shapes, run).copied_keys
    for pack in packs:
        layout, attention = Layout.build(pack, 8, 1, 8), AttentionPlan.from_pack(pack)
        for rank in range(8):
            calls = kernel_calls(attention.restrict(layout.query_ranges(rank)))
            assert sum(stop - start for _, keys, _ in calls for start, stop in keys) <= planned
    assert planned < 3.2 * packs[0].capacity


def test_scaled_packs_keep_the_mixture_and_shrink() -> None:
    packs = scaled_packs("ct3", 6, 2048)
    assert len(packs) == 6 and all(0.5 * 2048 < pack.length <= 2048 for pack in packs)
    assert packs == scaled_packs("ct3", 6, 2048)
    tasks = {sample.task for pack in scaled_packs("ct3", 24, 2048) for sample in pack.samples}
    assert tasks == set(STAGES["ct3"].shares())
    large = next(stage_samples("ct3", 0))
    assert packs[0].samples[0].task and mask_pairs(large.segments) > max(
        mask_pairs(s.segments) for pack in packs for s in pack.samples
    )
    assert any(sample.label_spans for pack in scaled_packs("ct3", 24, 2048) for sample in pack.samples)


def test_packs_of_a_real_index_and_the_command(tiny_run: TinyRun, tmp_path: Path, command: Commander) -> None:
    index = PackIndex.open(tiny_run.load().data.pack_index)
    packs = index_plan_packs(index.folder, steps=1)
    count = index.shaping["global_batch_size"]
    assert [pack.work for pack in packs.packs] == [Work.of(index.pack(n).pack) for n in range(count)]
    assert (packs.capacity, packs.per_step) == (index.capacity, count)
    assert all(pack.encoder_flops > 0 for pack in packs.packs)
    line = (
        f"plan_parallelism --config {tiny_run.config} --devices 8 --pack-index {index.folder} "
        f"--network-bandwidth 25 --out {tmp_path}"
    )
    done = command(line, folder=tmp_path)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["choices"] and record["explanation"] and record["rates"]["source"] == "published figures"
    assert record["cluster"]["devices"] == 8 and record["rates"]["links"]["network_bandwidth"] == 0.9 * 25e9
    assert record["packs"]["per_step"] == count
    assert [point["devices"] for point in record["weak_scaling"]][-1] == 16384
    assert record["strong_scaling"] and "discarded" in done.out
    assert (tmp_path / "plan.html").read_text().count("data:image/svg") == 4
