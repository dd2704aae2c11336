"""The page of a profile.

Station: profile -> [HTML] -> a person.
"""

from __future__ import annotations

import html
from pathlib import Path

from megatron_lance.profiling.charts import Bars, Chart, image
from megatron_lance.profiling.page import page, preformatted, section
from megatron_lance.profiling.throughput import SHOWN, Profile, table

MOST_RANKS = 64
"""Bars of ranks at most; of more the slowest and the fastest are shown."""


def _rank_bars(profile: Profile) -> dict[str, dict[str, float]]:
    ranks = sorted(profile["ranks"], key=lambda rank: -rank["profiled_seconds"])
    if len(ranks) > MOST_RANKS:
        ranks = [*ranks[: MOST_RANKS // 2], *ranks[-MOST_RANKS // 2 :]]
    ranks.sort(key=lambda rank: rank["rank"])
    return {f"rank {r['rank']} (node {r['node']})": {name: r["parts"][name] for name in SHOWN} for r in ranks}


def write_profile_page(profile: Profile, path: Path) -> None:
    """Write the page of a profile: the table, time by part and rank, steps, memory, FLOPs."""
    kinds = ("weights", "gradients", "optimizer", "activations")
    memory = {
        f"rank {rank['rank']}": {kind: rank["memory"][kind] / 2**20 for kind in kinds}
        for rank in profile["ranks"][:MOST_RANKS]
    }
    formula = profile["ranks"][0]["memory"]
    memory["rank 0, by formula"] = {
        **{kind: formula[kind] / 2**20 for kind in kinds[:3]},
        "activations": formula["activations by formula"] / 2**20,
    }
    flops = {name: {kind: value / 1e12 for kind, value in found.items()} for name, found in profile["flops"].items()}
    steps = profile["step_seconds"]["all"]
    curve = {"step time": (range(1, len(steps) + 1), steps)}
    timed = Chart("Timed steps, slowest rank", "s", curve, from_zero=True, dots=True)
    degrees = " x ".join(f"{name} {size}" for name, size in profile["layout"].items())
    sections = [
        section("Summary", preformatted(table(profile))),
        section("Where a step's time goes", image(Bars("One profiled step, by rank", "s", _rank_bars(profile)))),
        section("Steps", f'<div class="charts">{image(timed)}</div>'),
        section("Memory", image(Bars("Held by a rank", "MiB", memory))),
        section("FLOPs", image(Bars("Of a global batch", "TFLOP", flops))),
    ]
    title = f"Throughput, {degrees}"
    path.write_text(page(title, f"<h1>{html.escape(title)}</h1>{''.join(sections)}"), encoding="utf-8")
