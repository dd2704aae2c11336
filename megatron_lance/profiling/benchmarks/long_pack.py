"""Benchmark of one long pack through planning, dealing and a small model of one layer, forward and backward.

Station: synthetic pack -> plan, layout, positions, dispatch -> model -> [times, memory] -> tools/bench.py.  Start it
with torchrun; all ranks form one context-parallel group.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_lance.config.schema import ModelConfig, ParallelConfig
from megatron_lance.data.synthetic import stage_packs
from megatron_lance.model.heads import HeadOutputs
from megatron_lance.model.lance_model import build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.objectives.losses import velocity_error, weighted_sum
from megatron_lance.objectives.random_values import FilledPack
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.positions import Mape, pack_positions
from megatron_lance.packing.sample import Pack
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.dispatch import rank_batch
from megatron_lance.profiling.communication import CollectiveCounter, gathered_keys_values

SUMMARY = "one 80k-token pack with a long video edit: planning, one small layer forward and backward, under torchrun"
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=512,
    mrope_section=(4, 6, 6),
)
"""One layer with two key/value heads."""
ALIGNMENT = 8
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--among", type=int, default=200, help="of so many ct3 packs the one with the longest sample")


def _longest(among: int) -> Pack:
    return max(stage_packs("ct3", among), key=lambda pack: max(sample.length for sample in pack.samples))


def _timed(times: dict[str, float], name: str, work: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = work()
    times[name] = time.perf_counter() - start
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure on all ranks; the slowest rank's times and the largest rank's memory count."""
    pack = _longest(args.among)
    parallel = ParallelConfig(context_parallel_size=int(os.environ.get("WORLD_SIZE", "1")), region_alignment=ALIGNMENT)
    groups = parallel_groups.initialize(parallel, seed=1)
    try:
        return on_ranks(pack, parallel, groups)
    finally:
        parallel_groups.destroy()


def on_ranks(pack: Pack, parallel: ParallelConfig, groups: parallel_groups.Groups) -> dict[str, Any]:
    """Measure a pack on the ranks of a context-parallel group; the same result on all of them.

    Args:
        pack: any.
        parallel: degrees of the groups.
        groups: all ranks are one context-parallel group.
    """
    times: dict[str, float] = {}
    plan = _timed(times, "attention plan", lambda: AttentionPlan.from_pack(pack))
    layout = _timed(times, "layout with deal", lambda: Layout.build(pack, groups.cp, 1, ALIGNMENT))
    _timed(times, "positions", lambda: pack_positions(pack, Mape.RELEASE, 1000))
    sizes = {"hidden": MODEL.hidden_size, "channels": MODEL.latent_channels, "vocabulary": MODEL.vocab_size}
    filled = _timed(times, "random values", lambda: FilledPack.random(pack, **sizes, seed=1))
    batch = _timed(
        times,
        "dispatch",
        lambda: rank_batch(
            pack,
            layout,
            filled.tokens,
            filled.visuals,
            filled.noise,
            mape=Mape.RELEASE,
            mape_step=1000,
            cp_rank=groups.cp_rank,
            tp_rank=0,
        ).to(groups.device, torch.float32),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (stage,) = build_stages(transformer_config(MODEL, parallel, "float32"), MODEL, MODEL.vocab_size)
    for parameter in stage.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    counter = CollectiveCounter()
    with counter:
        outputs: HeadOutputs = _timed(times, "forward", lambda: stage(batch))
        loss = weighted_sum(velocity_error(outputs.velocity, batch.target), batch.velocity_weights)
        _timed(times, "backward", loss.backward)
    everyone: list[Any] = [None] * groups.cp
    memory = {
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "before_model_mib": before / 1024,
    }
    own = {"times": times, "memory": memory, "pairs": batch.plan.mask_pairs, "slices": len(batch.plan.slices)}
    dist.all_gather_object(everyone, own)
    traffic = gathered_keys_values(MODEL, layout.rows, groups.cp, 1, 4)
    return {
        "cp": groups.cp,
        "tokens": pack.length,
        "samples": [{"task": str(s.task), "tokens": s.length} for s in pack.samples],
        "mask_pairs": plan.mask_pairs,
        "mask_pairs_max_over_mean": max(e["pairs"] for e in everyone) * groups.cp / plan.mask_pairs,
        "rows_per_rank": layout.rows,
        "seconds": {name: max(e["times"][name] for e in everyone) for name in times},
        "peak_mib": max(e["memory"]["peak_mib"] for e in everyone),
        "before_model_mib": max(e["memory"]["before_model_mib"] for e in everyone),
        "slices_per_rank": [e["slices"] for e in everyone],
        "collective_bytes": {"counted": sum(counter.moved.values()), "formula": traffic.total},
        "model": {"hidden": MODEL.hidden_size, "heads": MODEL.num_attention_heads, "layers": MODEL.num_layers},
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    longest = max(result["samples"], key=lambda sample: sample["tokens"])
    lines = [
        f"{result['tokens']} tokens, {len(result['samples'])} samples (longest: {longest['task']} of "
        f"{longest['tokens']}), {result['mask_pairs']:.3g} mask pairs, cp {result['cp']}, busiest rank "
        f"{result['mask_pairs_max_over_mean']:.3f} x mean",
        *(f"  {name:<18} {1e3 * seconds:10.1f} ms" for name, seconds in result["seconds"].items()),
        f"  peak memory of a rank {result['peak_mib']:.0f} MiB ({result['before_model_mib']:.0f} before the model)",
        f"  collectives {result['collective_bytes']['counted'] / 1e6:.1f} MB counted, "
        f"{result['collective_bytes']['formula'] / 1e6:.1f} MB by formula",
    ]
    return "\n".join(lines)
