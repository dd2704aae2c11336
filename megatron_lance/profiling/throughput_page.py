"""The page of a profile.

Station: profile -> [HTML] -> a person.
"""

from __future__ import annotations

from pathlib import Path

from megatron_lance.profiling.charts import lines, preformatted, stacked_bars, write_page
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
    steps = [(float(i + 1), seconds) for i, seconds in enumerate(profile["step_seconds"]["all"])]
    degrees = " x ".join(f"{name} {size}" for name, size in profile["layout"].items())
    sections = [
        ("Summary", preformatted(table(profile))),
        ("Where a step's time goes", stacked_bars("One profiled step, by rank", "s", _rank_bars(profile))),
        ("Steps", lines("Timed steps, slowest rank", "step", "seconds", {"step time": steps})),
        ("Memory", stacked_bars("Held by a rank", "MiB", memory)),
        ("FLOPs", stacked_bars("Of a global batch", "TFLOP", flops)),
    ]
    write_page(path, f"Throughput, {degrees}", sections)
