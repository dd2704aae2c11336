"""Which layout trains a model fastest on a cluster, and how it goes on to more devices.

    python tools/plan_parallelism.py --config FILE --stage ct3 --device H100 --devices 64 --out DIR
    python tools/plan_parallelism.py ... --pack-index DIR --calibrate profile.json ...
    python tools/plan_parallelism.py --config FILE --recipes FILE       # every stage on 8, 64 and 128 devices

Packs are synthetic ones of the stage, or those of a real index; rates are published figures, or calibrated from
profiles of tools/profile_throughput.py.  DIR gets plan.json and plan.html.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.data.synthetic import STAGES
from megatron_lance.profiling.cluster import Cluster
from megatron_lance.profiling.devices import DEVICES, find_device
from megatron_lance.profiling.plan_inputs import index_plan_packs, stage_plan_packs
from megatron_lance.profiling.plan_page import write_plan_page
from megatron_lance.profiling.planner import Plan, Wanted, explain, plan
from megatron_lance.profiling.provenance import provenance
from megatron_lance.profiling.recipe_plans import recipe_plans, table
from megatron_lance.profiling.scaling import SIZES, Point, strong_scaling, weak_scaling
from megatron_lance.profiling.step_time import Rates, calibrate
from megatron_lance.profiling.throughput import read_profile


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML file; later ones win")
    parser.add_argument(
        "--stage", choices=sorted(STAGES), default="ct3", help="mixture and packs per step (default ct3)"
    )
    parser.add_argument("--pack-index", type=Path, metavar="DIR", help="take the packs of this index instead")
    parser.add_argument("--packs-per-step", type=int, metavar="N", help="default: the stage's recipe, or the index's")
    parser.add_argument("--tolerance", type=float, default=0.2, help="by which they may differ (default 0.2)")
    parser.add_argument("--device", default="H100", help=f"one of {', '.join(d.name for d in DEVICES)} (default H100)")
    parser.add_argument("--devices", type=int, metavar="N", help="how many")
    parser.add_argument("--recipes", type=Path, metavar="FILE", help="plan all recipes and write them there; no more")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a device; default: its data sheet's")
    parser.add_argument("--node-size", type=int, default=8, help="devices of a node (default 8)")
    parser.add_argument("--node-bandwidth", type=float, metavar="GB/s", help="per direction within a node")
    parser.add_argument(
        "--network-bandwidth", type=float, metavar="GB/s", help="per device and direction between nodes"
    )
    parser.add_argument(
        "--calibrate", nargs="+", default=[], metavar="PROFILE", help="profile.json files for the rates"
    )
    parser.add_argument("--fp8", action="store_true", help="also rank FP8 linears")
    parser.add_argument("--no-scaling", action="store_true", help="leave out the scaling curves")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for plan.json and plan.html")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    return parser.parse_intermixed_args()


def _cluster(options: argparse.Namespace) -> Cluster:
    device = find_device(options.device)
    if device is None:
        raise UserError(f"--device {options.device}: unknown; choose one of {', '.join(d.name for d in DEVICES)}")
    if options.devices is None:
        raise UserError("--devices: is not given; say how many there are")
    gigabytes = (options.node_bandwidth, options.network_bandwidth)
    node_bandwidth, network_bandwidth = (None if value is None else 1e9 * value for value in gigabytes)
    return Cluster.of(
        device,
        options.devices,
        node_size=options.node_size,
        memory_gib=options.memory,
        node_bandwidth=node_bandwidth,
        network_bandwidth=network_bandwidth,
    )


def _wanted(options: argparse.Namespace, run: RunConfig) -> Wanted:
    packs = stage_plan_packs(options.stage) if options.pack_index is None else index_plan_packs(options.pack_index)
    per_step = packs.per_step if options.packs_per_step is None else options.packs_per_step
    if per_step < 1 or not 0 <= options.tolerance < 1:
        raise UserError(
            f"--packs-per-step {per_step}, --tolerance {options.tolerance:g}: must be at least 1, and from 0 to below 1"
        )
    return Wanted(run, packs, per_step, options.tolerance, fp8=options.fp8)


def _rates(options: argparse.Namespace, cluster: Cluster) -> Rates:
    profiles = {path: read_profile(path) for path in options.calibrate}
    for path, profile in profiles.items():
        if find_device(profile["device_name"]) != cluster.device:
            raise UserError(
                f"--calibrate {path}: was measured on {profile['device_name']}, the plan is for {cluster.device.name}; "
                "name a profile of that device"
            )
    return calibrate(list(profiles.values()), cluster.rates()) if profiles else cluster.rates()


def _show(found: Plan) -> None:
    print(f"{len(found.choices)} layouts fit, {len(found.discarded)} do not")
    for kind, (count, example) in found.reasons().items():
        print(f"  {count} discarded, {kind}; {example}")
    for line in explain(found):
        print(line)


def _scaled(
    options: argparse.Namespace, found: Plan, wanted: Wanted, cluster: Cluster, rates: Rates
) -> tuple[list[Point], list[Point]]:
    if options.no_scaling or not found.choices:
        return [], []
    sizes = [size for size in SIZES if size >= options.node_size]
    weak = weak_scaling(found.choices[0], wanted, cluster, rates)
    return weak, strong_scaling(wanted, cluster, rates, sizes)


def _command() -> str:
    return " ".join(["python", "tools/plan_parallelism.py", *sys.argv[1:]])


def main() -> int:
    """Run; returns the exit status."""
    options = parse_arguments()
    run = load_config(options.config, options.overrides)
    if options.recipes is not None:
        if not options.recipes.parent.is_dir():
            raise UserError(f"--recipes {options.recipes}: its folder is missing; make it, or name another file")
        plans = list(recipe_plans(run))
        written = {"command": _command(), **provenance(), "plans": plans}
        options.recipes.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        print(table(plans))
        return 0
    if options.out is not None and options.out.is_file():
        raise UserError(f"--out {options.out}: is a file; name a folder")
    cluster = _cluster(options)
    rates, wanted = _rates(options, cluster), _wanted(options, run)
    found = plan(wanted, cluster, rates)
    _show(found)
    weak, strong = _scaled(options, found, wanted, cluster, rates)
    for name, points in (("weak", weak), ("strong", strong)):
        for point in points:
            print(
                f"{name:>6} {point.devices:>6} devices: {point.choice.name}, MFU {point.choice.mfu:.1%}, goodput "
                f"{point.losses.goodput:.1%}, {point.tokens_per_second:.4g} tokens/s"
            )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        title = f"Layouts for {wanted.packs.source} on {cluster.devices} x {cluster.device.name}"
        write_plan_page(found, cluster, rates, weak, strong, title, options.out / "plan.html")
        record: dict[str, Any] = {
            "command": _command(),
            **provenance(),
            "cluster": asdict(cluster),
            "rates": asdict(rates),
            "packs": {"source": wanted.packs.source, "per_step": wanted.packs_per_step, "tolerance": wanted.tolerance},
            "explanation": explain(found),
            "choices": [choice.record() for choice in found.best_by_degrees()[:20]],
            "discarded": {kind: {"count": n, "example": e} for kind, (n, e) in found.reasons().items()},
            "weak_scaling": [point.record() for point in weak],
            "strong_scaling": [point.record() for point in strong],
        }
        (options.out / "plan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not found.choices:
        raise UserError(f"{cluster.devices} x {cluster.device.name}: no layout is possible; see why above")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("plan_parallelism", main))
