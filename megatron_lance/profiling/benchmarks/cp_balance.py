"""Benchmark of context parallelism: balance of the deal, cost of finding it, bytes it moves.

Station: synthetic packs of a stage -> plan, deal -> [figures] -> tools/bench.py.  Work per rank is counted exactly
(mask pairs) and as kernels do it (128 x 128 tiles); the zigzag deal of peers stands beside ours.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_lance.config.schema import ModelConfig
from megatron_lance.data.synthetic import STAGES, stage_packs
from megatron_lance.packing.attention_plan import AttentionPlan, Range
from megatron_lance.packing.balance import deal_queries, tile_costs
from megatron_lance.packing.layout import Layout, token_experts
from megatron_lance.packing.sample import Pack
from megatron_lance.profiling import communication
from megatron_lance.profiling.communication import LayerTraffic

SUMMARY = "balance, solver time and communication of context parallelism on synthetic packs of a stage"
ALIGNMENT = 16
TENSOR_PARALLEL = (1, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--stage", choices=sorted(STAGES), default="ct3", help="mixture and budget (default ct3)")
    parser.add_argument("--packs", type=int, default=200, help="packs (default 200)")
    parser.add_argument("--cp", type=int, nargs="+", default=[2, 4, 8, 16, 64], help="context-parallel sizes")


def _runs(tokens: np.ndarray) -> list[Range]:
    """Ascending tokens as ranges."""
    runs = np.split(tokens, np.flatnonzero(np.diff(tokens) != 1) + 1)
    return [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]


def _zigzag(tokens: np.ndarray, cp: int) -> list[np.ndarray]:
    """2 cp equal chunks, rank r gets the r-th from both ends: balanced for one causal sequence."""
    chunks = np.array_split(tokens, 2 * cp)
    return [np.concatenate([chunks[r], chunks[2 * cp - 1 - r]]) for r in range(cp)]


def _imbalance(values: list[int]) -> float:
    return float(max(values) / np.mean(values))


def _of_deal(plan: AttentionPlan, dealt: list[list[np.ndarray]]) -> dict[str, float]:
    """Max over mean of the ranks' pairs, tiles and rows, and the mean number of slices."""
    ranks = [np.sort(np.concatenate(parts)) for parts in zip(*dealt, strict=True)]
    plans = [plan.restrict(_runs(tokens)) for tokens in ranks]
    return {
        "mask_pairs": _imbalance([p.mask_pairs for p in plans]),
        "tiles": _imbalance([int(tile_costs(p).sum()) for p in plans]),
        "rows": _imbalance([len(tokens) for tokens in ranks]),
        "slices": float(np.mean([len(p.slices) for p in plans])),
    }


def _measure(pack: Pack, cp: int) -> dict[str, float]:
    """Everything of one pack."""
    plan, gen = AttentionPlan.from_pack(pack), token_experts(pack)
    experts = (np.flatnonzero(~gen), np.flatnonzero(gen))
    start = time.perf_counter()
    dealt = deal_queries(plan, experts, cp)
    seconds = time.perf_counter() - start
    zigzag = _of_deal(plan, [_zigzag(tokens, cp) for tokens in experts])
    layout = Layout.build(pack, cp, 1, ALIGNMENT)
    return {
        **_of_deal(plan, dealt),
        "zigzag_tiles": zigzag["tiles"],
        "padding": 1 - pack.length / (cp * layout.rows),
        "solver_ms": 1e3 * seconds,
    }


def _summary(measured: list[dict[str, float]]) -> dict[str, Any]:
    values = {name: np.array([m[name] for m in measured]) for name in measured[0]}
    result: dict[str, Any] = {
        name: {"mean": float(values[name].mean()), "worst": float(values[name].max())}
        for name in ("mask_pairs", "tiles", "rows", "zigzag_tiles", "slices", "padding")
    }
    result["solver_ms"] = {f"p{q}": float(np.percentile(values["solver_ms"], q)) for q in (20, 50, 80, 95)}
    return result


def _traffic(capacity: int, cp: int) -> dict[str, dict[str, float | None]]:
    """MB per layer, forward and backward together, of Lance-3B in bf16, by tp."""
    model, rows, table = ModelConfig(), capacity // cp, {}

    def megabytes(traffic: LayerTraffic | None) -> float | None:
        return None if traffic is None else traffic.total / 1e6

    for tp in TENSOR_PARALLEL:
        table[f"tp{tp}"] = {
            "gathered_keys_values": megabytes(communication.gathered_keys_values(model, rows, cp, tp, 2)),
            "ring": megabytes(communication.ring(model, rows, cp, tp, 2)),
            "head_splitting": megabytes(communication.head_splitting(model, rows, cp, tp, 2)),
            "qkv_over_tp": megabytes(communication.qkv_over_tp(model, rows, tp, 2)),
            "sequence_parallel": megabytes(communication.sequence_parallel(model, rows, tp, 2)),
        }
    return table


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the result is one JSON object."""
    packs = stage_packs(args.stage, args.packs)
    by_cp = {}
    for cp in args.cp:
        measured = [_measure(pack, cp) for pack in tqdm(packs, desc=f"cp {cp}", unit="pack", leave=False)]
        by_cp[str(cp)] = {
            **_summary(measured),
            "megabytes_per_layer": _traffic(STAGES[args.stage].capacity, cp),
        }
    lengths = [sample.length for pack in packs for sample in pack.samples]
    return {
        "stage": args.stage,
        "packs": len(packs),
        "tokens_per_pack": float(np.mean([pack.length for pack in packs])),
        "longest_sample": max(lengths),
        "samples_per_pack": len(lengths) / len(packs),
        "by_cp": by_cp,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['packs']} packs of stage {result['stage']}, {result['tokens_per_pack']:.0f} tokens each; "
        "max/mean over ranks: mean (worst)",
        f"{'cp':>4} {'tiles':>16} {'mask pairs':>16} {'rows':>16} {'zigzag tiles':>16} {'slices':>7} {'padding':>8} "
        f"{'solver p50':>11} {'MB/layer tp1: ours':>19} {'ring':>7} {'heads':>7}",
    ]
    for cp, r in result["by_cp"].items():
        shares = [f"{r[n]['mean']:.4f} ({r[n]['worst']:.4f})" for n in ("tiles", "mask_pairs", "rows", "zigzag_tiles")]
        tp1 = r["megabytes_per_layer"]["tp1"]
        heads = "-" if tp1["head_splitting"] is None else f"{tp1['head_splitting']:.0f}"
        lines.append(
            f"{cp:>4} "
            + " ".join(f"{s:>16}" for s in shares)
            + f" {r['slices']['mean']:>7.1f} {r['padding']['mean']:>8.2%} {r['solver_ms']['p50']:>8.1f} ms "
            + f"{tp1['gathered_keys_values']:>19.0f} {tp1['ring']:>7.0f} {heads:>7}"
        )
    return "\n".join(lines)
