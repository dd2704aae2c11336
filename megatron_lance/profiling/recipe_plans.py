"""The layouts of the recipes: every stage on clusters of several sizes and devices.

Station: recipes, clusters -> [plans] -> docs/results/planner/lance_3b.json, which the recipes' configurations follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_lance.config.schema import RunConfig
from megatron_lance.profiling.cluster import Cluster
from megatron_lance.profiling.devices import find_device
from megatron_lance.profiling.plan_inputs import RECIPE_PACKS, stage_plan_packs
from megatron_lance.profiling.planner import Wanted, explain, plan

STAGES = {"pt": "pt", "ct": "ct3", "sft": "sft"}
"""Stage of a recipe and whose mixture stands for it; of CT the last, with most edits and the longest samples."""
SIZES, DEVICES = (8, 64, 128), {"80GB": "H100", "141GB": "H200"}


def recipe_plans(run: RunConfig) -> Iterator[dict[str, Any]]:
    """One record per stage, size and device: the choice, how it does, and the next best.

    Args:
        run: model and precision.
    """
    for stage, mixture in STAGES.items():
        packs = stage_plan_packs(mixture)
        for memory, name in DEVICES.items():
            device = find_device(name)
            assert device is not None
            for devices in SIZES:
                cluster = Cluster.of(device, devices)
                found = plan(Wanted(run, packs, RECIPE_PACKS[mixture]), cluster, cluster.rates())
                best = found.best_by_degrees()
                yield {
                    "stage": stage,
                    "mixture": mixture,
                    "devices": devices,
                    "device": name,
                    "memory": memory,
                    "choice": best[0].record() if best else None,
                    "explanation": explain(found, runners_up=3),
                    "layouts": {"fit": len(found.choices), "discarded": len(found.discarded)},
                }


def table(plans: list[dict[str, Any]]) -> str:
    """As text."""
    lines = [
        f"{'stage':<6} {'devices':>7} {'device':>6} {'layout':<34} {'packs':>5} {'GiB':>5} {'step s':>7} "
        f"{'tokens/s/dev':>12} {'MFU':>6} {'BAGEL':>6}"
    ]
    for found in plans:
        choice = found["choice"]
        if choice is None:
            lines.append(f"{found['stage']:<6} {found['devices']:>7} {found['memory']:>6} none")
            continue
        degrees = "-".join(f"{axis}{choice[axis]}" for axis in ("tp", "cp", "pp", "vpp", "dp") if choice[axis] > 1)
        name, held = f"{degrees or 'one'}, {choice['recompute']}", choice["memory_gib"]["with_reserve"]
        lines.append(
            f"{found['stage']:<6} {found['devices']:>7} {found['memory']:>6} {name:<34} "
            f"{choice['global_batch_size']:>5} {held:>5.0f} {choice['step_seconds']:>7.2f} "
            f"{choice['tokens_per_second_per_device']:>12,.0f} {choice['mfu']:>6.1%} {choice['bagel_mfu']:>6.1%}"
        )
    return "\n".join(lines)
