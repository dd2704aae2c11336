"""A measured profile as one JSON object, as text, and compared with another.

Station: what all ranks measured -> [profile] -> JSON, table, HTML page, calibration of the planner.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import RunConfig
from megatron_lance.profiling.flops import Speed, Work, flops_by_part, model_flops
from megatron_lance.profiling.trace import EXPOSED, IDLE, PARTS

Profile = dict[str, Any]
SHOWN = (*PARTS, EXPOSED, IDLE)
KEYS = {"device_name", "layout", "memory", "parts", "profiler_slows", "ranks", "speed", "step_seconds"}
"""What every profile.json has."""


@dataclass(frozen=True)
class Measured:
    """What the ranks of a profile found.

    Attributes:
        ranks: what each reports, in order.
        works: real tokens and mask pairs of the global batch of each timed step.
        profiled: of the profiled step.
        capacity: tokens the packs of a step could hold.
        padded: rows that were computed for them.
        peak_tflops: of a device; None if unknown.
        device: cuda or cpu.
        source: stage or data the packs are of.
    """

    ranks: Sequence[Mapping[str, Any]]
    works: Sequence[Work]
    profiled: Work
    capacity: int
    padded: int
    peak_tflops: float | None
    device: str
    source: str


def read_profile(path: str) -> Profile:
    """A profile that tools/profile_throughput.py wrote.

    Raises:
        UserError: if it is none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"profile '{path}': cannot be read ({error}); name a profile.json of this program") from error
    missing = KEYS - content.keys() if isinstance(content, dict) else KEYS
    if missing:
        raise UserError(f"profile '{path}': has no {', '.join(sorted(missing))}; name a profile.json of this program")
    return content


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    found = {f"p{q}": float(np.percentile(seconds, q)) for q in (20, 50, 80, 95)}
    return {**found, "mean": float(np.mean(seconds)), "steps": len(seconds)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    mean = float(np.mean(values))
    return {"mean": mean, "min": min(values), "max": max(values), "slowest": int(np.argmax(values))}


def busy(rank: Mapping[str, Any]) -> float:
    """Seconds of work of a rank in the profiled step."""
    return sum(rank["parts"][name] for name in PARTS)


def summary(run: RunConfig, measured: Measured) -> Profile:
    """The profile.

    Rates are those of all timed steps together.  "profiler_slows" is how many times as long the profiled step took as a
    timed one of as many model FLOPs would have; the parts are of the profiled step.

    Args:
        run: the whole configuration.
        measured: by its ranks.
    """
    ranks, work = measured.ranks, Work.mean(measured.works)
    whole = [max(values) for values in zip(*(rank["seconds"] for rank in ranks), strict=True)]  # the slowest rank's
    steps = _percentiles(whole)
    speed = Speed.of(run.model, work, steps["mean"], len(ranks), measured.peak_tflops, run.training.freeze)
    per_second = model_flops(run.model, work, run.training.freeze) / steps["mean"]
    undisturbed = model_flops(run.model, measured.profiled, run.training.freeze) / per_second
    nodes = sorted({rank["node"] for rank in ranks})
    parallel = run.parallel
    degrees = {
        "tp": parallel.tensor_model_parallel_size,
        "cp": parallel.context_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.virtual_pipeline_model_parallel_size or 1,
    }
    dp = len(ranks) // (degrees["tp"] * degrees["cp"] * degrees["pp"])
    model = flops_by_part(run.model, work, run.parallel, run.training.freeze)
    return {
        "device": measured.device,
        "world_size": len(ranks),
        "layout": {**degrees, "dp": dp},
        "recompute": _recompute(run),
        "precision": run.training.precision,
        "model": asdict(run.model),
        "parallel": asdict(run.parallel),
        "packs": {
            "source": measured.source,
            "per_step": run.training.global_batch_size,
            "tokens": work.tokens,
            "capacity": measured.capacity,
            "padded": measured.padded,
            "mask_pairs": work.pairs,
            "ce_rows": work.ce,
        },
        "step_seconds": {**steps, "all": whole},
        "tokens_per_second_per_device": {
            "real": work.tokens / steps["mean"] / len(ranks),
            "padded": measured.padded / steps["mean"] / len(ranks),
        },
        "speed": {**asdict(speed), "peak_tflops": measured.peak_tflops},
        "profiler_slows": max(rank["profiled_seconds"] for rank in ranks) / undisturbed,
        "flops": {name: asdict(flops) for name, flops in model.items()},
        "parts": {name: _spread([rank["parts"][name] for rank in ranks]) for name in SHOWN},
        "busy": _spread([busy(rank) for rank in ranks]),
        "nodes": [{"node": node, **_spread([busy(rank) for rank in ranks if rank["node"] == node])} for node in nodes],
        "memory": {kind: _spread([rank["memory"][kind] for rank in ranks]) for kind in ranks[0]["memory"]},
        "ranks": list(ranks),
    }


def _recompute(run: RunConfig) -> str:
    granularity, experts = run.parallel.recompute_granularity, set(run.parallel.recompute_experts)
    if granularity != "selective":
        return granularity or "none"
    return ",".join(run.parallel.recompute_modules) + (f" of {experts.pop()}" if len(experts) == 1 else "")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def table(profile: Profile) -> str:
    """The profile as text."""
    steps, speed, rate = profile["step_seconds"], profile["speed"], profile["tokens_per_second_per_device"]
    packs, layout = profile["packs"], profile["layout"]
    degrees = " x ".join(f"{name} {size}" for name, size in layout.items())
    lines = [
        f"{profile['world_size']} {profile['device']} ranks, {degrees}, recompute {profile['recompute']}, "
        f"{profile['precision']}; {packs['per_step']} packs of {packs['source']} a step, {packs['tokens']} tokens, "
        f"fill {packs['tokens'] / packs['capacity']:.1%}, {packs['mask_pairs']:.3g} mask pairs",
        f"step p20 {steps['p20']:.3f} p50 {steps['p50']:.3f} p80 {steps['p80']:.3f} p95 {steps['p95']:.3f} mean "
        f"{steps['mean']:.3f} s ({steps['steps']} steps); the profiler makes a step {profile['profiler_slows']:.2f} "
        "times as long",
        f"tokens/s and device {rate['real']:.0f} real, {rate['padded']:.0f} with padding; TFLOP/s and device "
        f"{speed['tflops']:.3g}, MFU {_percent(speed['mfu'])}; by the BAGEL formula {speed['bagel_tflops']:.3g}, "
        f"{_percent(speed['bagel_mfu'])}",
        f"{'part of the profiled step':<26} {'mean s':>8} {'share':>6} {'min s':>8} {'max s':>8} {'slowest rank':>12}",
    ]
    whole = sum(profile["parts"][name]["mean"] for name in SHOWN)
    for name in SHOWN:
        found = profile["parts"][name]
        lines.append(
            f"{name:<26} {found['mean']:>8.3f} {found['mean'] / whole:>6.1%} {found['min']:>8.3f} {found['max']:>8.3f} "
            f"{found['slowest']:>12}"
        )
    lines += [
        f"{'node ' + str(node['node']) + ', busy':<26} {node['mean']:>8.3f} {node['mean'] / whole:>6.1%} "
        f"{node['min']:>8.3f} {node['max']:>8.3f} {node['slowest']:>12}"
        for node in profile["nodes"]
    ]
    lines.append(
        "memory of the fullest rank, MiB: "
        + ", ".join(f"{kind} {found['max'] / 2**20:.1f}" for kind, found in profile["memory"].items())
    )
    return "\n".join(lines)


def compare(a: Profile, b: Profile) -> str:
    """Two profiles beside one another: A, B, and B over A."""
    rows: list[tuple[str, float, float]] = [
        (f"step {q} s", a["step_seconds"][q], b["step_seconds"][q]) for q in ("p20", "p50", "p80", "p95")
    ]
    for name in ("real", "padded"):
        rate = "tokens_per_second_per_device"
        rows.append((f"tokens/s, {name}", a[rate][name], b[rate][name]))
    rows.append(("TFLOP/s", a["speed"]["tflops"], b["speed"]["tflops"]))
    rows += [(f"{name} s", a["parts"][name]["mean"], b["parts"][name]["mean"]) for name in SHOWN]
    kinds = [kind for kind in a["memory"] if kind in b["memory"]]
    rows += [(f"{kind} MiB", *(p["memory"][kind]["max"] / 2**20 for p in (a, b))) for kind in kinds]
    lines = [f"{'':<30} {'A':>12} {'B':>12} {'B/A':>7}"]
    for name, first, second in rows:
        ratio = f"{second / first:.2f}" if first else "-"
        lines.append(f"{name:<30} {first:>12.4g} {second:>12.4g} {ratio:>7}")
    for key in ("layout", "recompute", "precision", "device"):
        if a[key] != b[key]:
            lines.append(f"{key}: A {a[key]}, B {b[key]}")
    return "\n".join(lines)
