"""Benchmark of saves: how long training stands still, and how long a checkpoint takes, at once and in the background.

Station: a model of full width and few layers -> [saves, with forward and backward between them] -> tools/bench.py.
The optimizer takes no step between saves: that would copy, page by page, all that a writer in the background still
holds, which is memory that the machine may not have.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megatron_lance.checkpoint.manifest import DP_RESHARDABLE, FULLY_RESHARDABLE, DataIdentity
from megatron_lance.checkpoint.saver import Saver
from megatron_lance.checkpoint.store import PendingWeights, TrainingState
from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.schema import ModelConfig, RunConfig, TrainingConfig
from megatron_lance.data.synthetic import stage_samples
from megatron_lance.objectives.losses import velocity_error, weighted_sum
from megatron_lance.objectives.random_values import FilledPack
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Pack
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.dispatch import RankBatch, rank_batch
from megatron_lance.training.setup import Trainee, build

SUMMARY = "stall of training and total time of a save, at once and in the background; full width, few layers"
VOCABULARY = 4096  # rows; the real 151,936 add nothing but memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--layers", type=int, default=2, help="dual-expert layers of the 3B width")
    parser.add_argument("--repeats", type=int, default=3, help="saves of each kind")
    parser.add_argument(
        "--fully", action="store_true", help="fully_reshardable too, which holds the optimizer's state three times"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="disk to write to; by default the temporary folder's")


def _batch(run: RunConfig, groups: parallel_groups.Groups) -> RankBatch:
    """The shortest of some synthetic samples as a pack."""
    sample = min(islice(stage_samples("pt", 1), 300), key=lambda sample: sample.length)
    pack = Pack((sample,), sample.length)
    model = run.model
    sizes = {"hidden": model.hidden_size, "channels": model.latent_channels, "vocabulary": model.vocab_size}
    filled = FilledPack.random(pack, **sizes, seed=1)
    return rank_batch(
        pack,
        Layout.build(pack, 1, 1, row_alignment(run)),
        filled.tokens,
        filled.visuals,
        filled.noise,
        mape=Mape.RELEASE,
        mape_step=model.mape_step,
        cp_rank=0,
        tp_rank=0,
    ).to(groups.device, torch.float32)


def _pass(trainee: Trainee, batch: RankBatch) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    (chunk,) = trainee.chunks
    chunk.zero_grad_buffer()
    outputs = chunk(batch)
    weighted_sum(velocity_error(outputs.velocity, batch.target), batch.velocity_weights).backward()
    return time.perf_counter() - start


def _save(saver: Saver, step: int, trainee: Trainee, batch: RankBatch) -> dict[str, Any]:
    """One save, with passes until it is published."""
    passes = []
    folder = saver.save(step)
    while saver.pending is not None:
        passes.append(_pass(trainee, batch))
        saver.poll()
    times = saver.take_times()
    return {
        "stall_seconds": times.stall_seconds,
        "seconds": times.seconds,
        "passes_meanwhile": len(passes),
        "pass_seconds": statistics.median(passes) if passes else None,
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure on one rank."""
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        model = replace(ModelConfig(), num_layers=args.layers, vocab_size=VOCABULARY, rope_inv_freq_dtype="bfloat16")
        training = TrainingConfig(run_dir=folder, precision="float32", keep_last=1)
        config = RunConfig(model=model, training=training)
        groups = parallel_groups.initialize(config.parallel, seed=1)
        try:
            trainee = build(config, groups, VOCABULARY, PendingWeights())
            kinds = (DP_RESHARDABLE, FULLY_RESHARDABLE) if args.fully else (DP_RESHARDABLE,)
            return _measure(config, trainee, _batch(config, groups), kinds, args.repeats)
        finally:
            parallel_groups.destroy()


def _measure(run: RunConfig, trainee: Trainee, batch: RankBatch, kinds: Sequence[str], repeats: int) -> dict[str, Any]:
    with torch.no_grad():
        for parameter in trainee.stages[0].parameters():
            parameter.fill_(0.01)
    alone = [_pass(trainee, batch) for _ in range(3)]
    state = TrainingState(trainee.chunks, trainee.optimizer, trainee.scheduler, ())
    rows: dict[str, list[dict[str, Any]]] = {}
    load, step = os.getloadavg()[0], 0
    ways = [(kind, behind) for kind in kinds for behind in (False, True)]
    for kind, behind in [(DP_RESHARDABLE, False), *ways * repeats]:  # the first warms up
        step += 1
        settings = replace(run, training=replace(run.training, save_format=kind, async_save=behind))
        row = _save(Saver(settings, state, DataIdentity("", ""), {}), step, trainee, batch)
        if step > 1:
            rows.setdefault(f"{kind}, {'in the background' if behind else 'at once'}", []).append(row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "layers": run.model.num_layers,
        "hidden": run.model.hidden_size,
        "parameters": sum(p.numel() for p in trainee.stages[0].parameters()),
        "rows": sum(batch.region_rows),
        "pass_seconds_alone": statistics.median(alone),
        "load_before": load,
        "peak_mib": peak / 1024,
        "saves": rows,
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['layers']} layers of width {result['hidden']}, {result['parameters']:,} parameters, float32, "
        f"one rank; load {result['load_before']:.1f} before, peak {result['peak_mib']:.0f} MiB",
        f"a forward and backward alone {result['pass_seconds_alone']:.2f} s",
        f"{'save':<38} {'stall s':>8} {'total s':>8} {'pass s':>8} {'GB':>6}",
    ]
    for name, rows in result["saves"].items():
        stall, total = (statistics.median(row[key] for row in rows) for key in ("stall_seconds", "seconds"))
        passes = [row["pass_seconds"] for row in rows if row["pass_seconds"] is not None]
        during = f"{statistics.median(passes):8.2f}" if passes else f"{'':8}"
        lines.append(f"{name:<38} {stall:8.2f} {total:8.2f} {during} {rows[0]['bytes'] / 1e9:6.2f}")
    return "\n".join(lines)
