"""The page of a plan.

Station: plan, scaling -> [HTML] -> a person.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from megatron_lance.profiling.charts import Bars, Chart, image
from megatron_lance.profiling.cluster import RESERVED_GIB, Cluster
from megatron_lance.profiling.memory import GIB
from megatron_lance.profiling.page import html_table, page, paragraph, section
from megatron_lance.profiling.planner import Choice, Plan, explain
from megatron_lance.profiling.scaling import Point
from megatron_lance.profiling.step_time import Rates

SHOWN = 10


def _table(choices: Sequence[Choice]) -> str:
    head = ("layout", "packs/step", "step s", "tokens/s/device", "MFU", "BAGEL MFU", "GiB")
    rows = [
        (
            choice.name,
            str(choice.run.training.global_batch_size),
            f"{choice.time.seconds:.2f}",
            f"{choice.tokens_per_second:,.0f}",
            f"{choice.mfu:.1%}",
            f"{choice.bagel_mfu:.1%}",
            f"{choice.memory_gib:.0f}",
        )
        for choice in choices
    ]
    return html_table(rows, head, "numbers")


def _time(choices: Sequence[Choice]) -> str:
    bars = {}
    for choice in choices:
        scale = choice.devices / choice.run.training.global_batch_size
        bars[choice.name] = {part: seconds * scale for part, seconds in choice.time.parts.items()}
    return image(Bars("Device time per pack, by part", "device seconds", bars))


def _memory(choices: Sequence[Choice], limit: float) -> str:
    bars = {}
    for choice in choices:
        memory = choice.memory
        bars[choice.name] = {
            "weights": memory.weight_bytes / GIB,
            "gradients": memory.gradient_bytes / GIB,
            "optimizer": memory.optimizer_bytes / GIB,
            "activations": memory.activation_bytes / GIB,
            "reserve": choice.memory_gib - memory.total_bytes / GIB,
        }
    return image(Bars(f"Fullest rank; reserve: {RESERVED_GIB:.0f} GiB and fragmentation", "GiB", bars, limit))


def _scaling(weak: Sequence[Point], strong: Sequence[Point]) -> str:
    curves = {name: points for name, points in (("weak", weak), ("strong", strong)) if points}
    if not curves:
        return paragraph("no size fits")
    rate, used = {}, {}
    for name, points in curves.items():
        devices = [point.devices for point in points]
        rate[name] = (devices, [point.tokens_per_second / point.devices for point in points])
        used[f"{name}: MFU"] = (devices, [100 * point.choice.mfu for point in points])
        used[f"{name}: goodput"] = (devices, [100 * point.losses.goodput for point in points])
    head = (
        "",
        "devices",
        "layout",
        "packs/step",
        "step s",
        "waiting",
        "bubble",
        "checkpoint every",
        "goodput",
        "tokens/s",
    )
    rows = [
        (
            name,
            f"{p.devices:,}",
            p.choice.name,
            f"{p.choice.run.training.global_batch_size:,}",
            f"{p.choice.time.seconds:.2f}",
            f"{p.choice.time.parts['waiting for replicas'] / p.choice.time.seconds:.1%}",
            f"{p.choice.time.parts['bubble'] / p.choice.time.seconds:.1%}",
            f"{p.losses.interval_seconds / 60:.0f} min",
            f"{p.losses.goodput:.1%}",
            f"{p.tokens_per_second:,.0f}",
        )
        for name, points in curves.items()
        for p in points
    ]
    charts = [
        Chart(title, unit, series, x="devices", doublings=True, from_zero=True, dots=True)
        for title, unit, series in (
            ("Tokens per second and device, after losses", "tokens/s", rate),
            ("Utilisation", "%", used),
        )
    ]
    return f'<div class="charts">{"".join(map(image, charts))}</div>{html_table(rows, head, "numbers")}'


def write_plan_page(
    found: Plan, cluster: Cluster, rates: Rates, weak: Sequence[Point], strong: Sequence[Point], title: str, path: Path
) -> None:
    """Write the page of a plan.

    Args:
        found: layouts.
        cluster: they are for.
        rates: they are ranked by.
        weak: weak scaling of the winner.
        strong: strong scaling.
        title: of the page.
        path: to write.
    """
    best = found.best_by_degrees()[:SHOWN]
    reasons = [(kind, str(count), example) for kind, (count, example) in found.reasons().items()]
    links = rates.links
    assumed = (
        f"Rates from {rates.source}: TFLOP/s of linears {rates.linears / 1e12:.3g}, of attention "
        f"{rates.attention / 1e12:.3g}, of encoders {rates.encoders / 1e12:.3g}; elementwise "
        f"{rates.elementwise / 1e12:.3g} TB/s; links {links.node_bandwidth / 1e9:.3g} GB/s within nodes of "
        f"{links.node_size}, {links.network_bandwidth / 1e9:.3g} GB/s between them."
    )
    sections = [section("What was found", *map(paragraph, explain(found)), paragraph(assumed))]
    if best:
        sections += [
            section("The fastest of each combination of degrees", _table(best)),
            section("Time", _time(best)),
            section("Memory", _memory(best, cluster.memory_gib)),
            section("Scaling", _scaling(weak, strong)),
        ]
    sections.append(section("Discarded", html_table(reasons, ("reason", "layouts", "for example"))))
    path.write_text(page(title, f"<h1>{html.escape(title)}</h1>{''.join(sections)}"), encoding="utf-8")
