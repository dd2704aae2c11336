"""Benchmark of FP8's alignment: rows that it adds, and how much of a mixture computes in bf16 for want of rows.

Station: synthetic packs of the stages -> rows per region and rank -> [figures] -> tools/bench.py.  Padding is what the
fixed number of rows of a run has beyond its budget of tokens; fill, the share of the budget that holds tokens, is
another matter and stands beside it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from megatron_lance.config.fp8 import RECIPES, fp8_alignment
from megatron_lance.config.schema import ParallelConfig
from megatron_lance.data.synthetic import STAGES, stage_packs
from megatron_lance.packing.layout import rows_per_rank, token_experts
from megatron_lance.packing.sample import Pack

SUMMARY = "rows that FP8's alignment adds per recipe and layout, and regions too small for it"
LAYOUTS = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 4), (2, 4), (4, 4), (1, 8), (2, 8), (1, 16))
"""(tp, cp)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--stage", choices=sorted(STAGES), nargs="+", default=sorted(STAGES), help="mixtures (all)")
    parser.add_argument("--packs", type=int, default=500, help="packs of each stage (default 500)")


@dataclass(frozen=True)
class Regions:
    """Tokens of the packs of a stage.

    Attributes:
        capacity: tokens of a full pack.
        tokens: (und, gen) of each pack.
    """

    capacity: int
    tokens: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, packs: Sequence[Pack], capacity: int) -> Regions:
        """Those of some packs."""
        gen = [int(token_experts(pack).sum()) for pack in packs]
        return cls(capacity, [(pack.length - g, g) for pack, g in zip(packs, gen, strict=True)])

    @property
    def fill(self) -> float:
        """Share of the budget that holds tokens."""
        return sum(map(sum, self.tokens)) / (len(self.tokens) * self.capacity)


def measure(regions: Regions, recipe: str, tp: int, cp: int) -> dict[str, Any]:
    """Rows of a run and regions in bf16, of one recipe on one layout.

    A context-parallel rank gets an equal share of each region, to one token (packing/balance.py).
    """
    alignment = math.lcm(ParallelConfig().region_alignment, fp8_alignment(recipe, tp))
    rows = rows_per_rank(regions.capacity, cp, tp, alignment)
    switches = recipe not in ("none", "delayed")  # delayed scaling leaves no region out
    small = [[switches and math.ceil(t / cp) < alignment * tp for t in pack] for pack in regions.tokens]
    pairs = [pair for pack, s in zip(regions.tokens, small, strict=True) for pair in zip(pack, s, strict=True)]
    in_bf16 = sum(tokens for tokens, is_small in pairs if is_small)
    return {
        "recipe": recipe,
        "tp": tp,
        "cp": cp,
        "alignment": alignment,
        "step": alignment * tp,
        "rows_per_cp_rank": rows,
        "padding": rows * cp / regions.capacity - 1,
        "packs_with_small_und": sum(s[0] for s in small) / len(small),
        "packs_with_small_gen": sum(s[1] for s in small) / len(small),
        "tokens_in_bf16": in_bf16 / sum(map(sum, regions.tokens)),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the result is one JSON object."""
    stages = {}
    for stage in args.stage:
        packs = list(tqdm(stage_packs(stage, args.packs), desc=stage, total=args.packs, leave=False))
        regions = Regions.of(packs, STAGES[stage].capacity)
        stages[stage] = {
            "capacity": regions.capacity,
            "fill": regions.fill,
            "packs": len(packs),
            "rows": [measure(regions, recipe, *layout) for layout in LAYOUTS for recipe in RECIPES],
        }
    return {"region_alignment": ParallelConfig().region_alignment, "stages": stages}


def table(result: dict[str, Any]) -> str:
    """The result as text: a line per stage and layout, of each recipe its padding and its share of tokens in bf16."""
    lines = []
    for stage, found in result["stages"].items():
        lines.append(
            f"stage {stage}: packs of {found['capacity']} tokens, fill {found['fill']:.2%}; padding beyond them "
            "(alignment; tokens in bf16)"
        )
        lines.append(f"{'tp':>4} {'cp':>3} " + " ".join(f"{recipe:>24}" for recipe in RECIPES))
        for tp, cp in LAYOUTS:
            cells = [
                f"{r['padding']:>8.3%} ({r['alignment']}; {r['tokens_in_bf16']:.3%})"
                for r in found["rows"]
                if (r["tp"], r["cp"]) == (tp, cp)
            ]
            lines.append(f"{tp:>4} {cp:>3} " + " ".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)
