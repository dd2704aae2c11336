"""Benchmark of the planner: does its ranking of layouts agree with measured steps.

Station: layouts of this world -> profile of each -> rates from some of them -> [predicted beside measured] ->
tools/bench.py.  Start it with torchrun.  Rates are calibrated from the layouts without recompute and virtual stages;
those with them are predicted from the others.  Layouts are measured in rounds, and the fastest step of each counts,
for a machine may have other work.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_lance.config.validate import validate
from megatron_lance.data.synthetic import scaled_packs
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.packer import deal_packs
from megatron_lance.packing.sample import Pack
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.profiling.cluster import Cluster
from megatron_lance.profiling.devices import DEVICES
from megatron_lance.profiling.flops import Work
from megatron_lance.profiling.step_time import PackShape, calibrate, predict
from megatron_lance.profiling.throughput import Profile
from megatron_lance.training.profile import POOL, Settings, measure

SUMMARY = (
    "predicted beside measured step times of the layouts of this world, and their rank correlation, under torchrun"
)
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=704,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=2048,
    mrope_section=(4, 6, 6),
    latent_channels=16,
)
STAGE, PACKS = "ct3", 4
DEGREES = {"tp": "tensor_model", "cp": "context", "pp": "pipeline_model"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--tokens", type=int, default=768, help="of a pack (default 768)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps per round (default 10)")
    parser.add_argument("--rounds", type=int, default=1, help="times that every layout is measured (default 1)")


def layouts(world_size: int) -> dict[str, ParallelConfig]:
    """All layouts of one axis, or two, on all ranks, with and without full recompute; virtual stages too."""
    found = {}
    sizes = [n for n in (1, 2, 4, 8) if world_size % n == 0]
    for tp in sizes:
        for cp in sizes:
            for pp in sizes:
                if world_size % (tp * cp * pp):
                    continue
                dp = world_size // (tp * cp * pp)
                degrees = {"tp": tp, "cp": cp, "pp": pp, "dp": dp}
                name = "-".join(f"{axis}{size}" for axis, size in degrees.items() if size > 1) or "one"
                fields = {f"{DEGREES[axis]}_parallel_size": size for axis, size in degrees.items() if axis != "dp"}
                found[name] = ParallelConfig(**fields)  # type: ignore[arg-type]
                found[f"{name}-full"] = ParallelConfig(**fields, recompute_granularity="full")  # type: ignore[arg-type]
                if pp > 1 and PACKS // dp % pp == 0:
                    virtual = ParallelConfig(**fields, virtual_pipeline_model_parallel_size=2)  # type: ignore[arg-type]
                    found[f"{name}-vpp2"] = virtual
    return found


def _shape(pack: Pack) -> PackShape:
    """What a CPU computes of a pack: masked pairs of causal slices too."""
    pairs = sum(piece.num_queries * piece.num_keys for piece in AttentionPlan.from_pack(pack).slices)
    return replace(PackShape.of(pack), work=replace(Work.of(pack), pairs=pairs), encoder_flops=0.0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and predict; the result is one JSON object."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size not in (2, 4, 8):
        raise UserError(f"plan-check: takes 2, 4 or 8 ranks, there are {world_size}; start it with torchrun")
    base = RunConfig(
        model=MODEL,
        data=DataConfig(seq_length=args.tokens, max_seconds_generation=0.1),
        training=TrainingConfig(precision="float32", global_batch_size=PACKS),
    )
    settings = Settings(STAGE, args.steps, 1, False, None)
    runs = {name: replace(base, parallel=parallel) for name, parallel in layouts(world_size).items()}
    profiles: dict[str, list[Profile]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(args.rounds):
            for name, config in runs.items():
                validate(config, world_size)
                groups = parallel_groups.initialize(config.parallel, config.training.seed)
                profiles[name].append(measure(config, groups, settings, Path(scratch)))
                parallel_groups.leave()
    parallel_groups.destroy()
    packs = scaled_packs(STAGE, POOL * PACKS, args.tokens, base.training.seed)
    return _compared(runs, profiles, [_shape(pack) for pack in packs], world_size) | {
        "world_size": world_size,
        "stage": STAGE,
        "tokens": args.tokens,
        "steps": args.steps,
        "rounds": args.rounds,
    }


def _compared(
    runs: dict[str, RunConfig], profiles: dict[str, list[Profile]], shapes: list[PackShape], world_size: int
) -> dict[str, Any]:
    """Predicted beside measured."""
    known = [name for name in runs if not name.endswith(("-full", "-vpp2"))]
    published = Cluster.of(DEVICES[0], world_size).rates()
    rates = calibrate([profile for name in known for profile in profiles[name]], published)
    found = {}
    for name, config in runs.items():
        seconds = [second for profile in profiles[name] for second in profile["step_seconds"]["all"]]
        dp = profiles[name][0]["layout"]["dp"]
        steps = [range(i * PACKS, (i + 1) * PACKS) for i in range(POOL)]
        deal = [
            [[step[i] for i in part] for part in deal_packs([shapes[i].work.pairs for i in step], dp)] for step in steps
        ]
        found[name] = {
            "measured_seconds": min(seconds),
            "measured_all": seconds,
            "predicted_seconds": predict(config, world_size, rates, shapes, deal).seconds,
            "calibrated_from": name in known,
        }
    correlation = {"all": _correlation(list(found.values()))}
    held_out = [value for value in found.values() if not value["calibrated_from"]]
    correlation["not calibrated from"] = _correlation(held_out)
    shown = {"linears": rates.linears, "attention": rates.attention, "bandwidth": rates.links.node_bandwidth}
    return {"layouts": found, "correlation": correlation, "rates": shown}


def _correlation(values: list[dict[str, Any]]) -> dict[str, float]:
    measured, predicted = ([value[f"{kind}_seconds"] for value in values] for kind in ("measured", "predicted"))
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    return {
        "spearman": float(spearmanr(measured, predicted).statistic),
        "kendall": float(kendalltau(measured, predicted).statistic),
        "median_error": float(np.median(errors)),
        "layouts": len(values),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['world_size']} ranks, packs of {result['tokens']} tokens",
        f"{'layout':<22} {'measured s':>10} {'predicted s':>11} {'ratio':>6}  calibrated from",
    ]
    for name, value in sorted(result["layouts"].items(), key=lambda item: item[1]["measured_seconds"]):
        measured, predicted = value["measured_seconds"], value["predicted_seconds"]
        mark = "yes" if value["calibrated_from"] else "no"
        lines.append(f"{name:<22} {measured:>10.3f} {predicted:>11.3f} {predicted / measured:>6.2f}  {mark}")
    for name, found in result["correlation"].items():
        lines.append(
            f"{name}: Spearman {found['spearman']:.2f}, Kendall {found['kendall']:.2f}, median error "
            f"{found['median_error']:.0%} over {found['layouts']} layouts"
        )
    return "\n".join(lines)
