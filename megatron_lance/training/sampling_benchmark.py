"""Benchmark of the sampler: with the clean context's keys and values kept, and without, for edits and a clip.

Station: random weights and conditions -> [guided Euler sampling, cached and uncached] -> tools/bench.py.  Both ways
give the same samples; how far they differ is part of the result, and which share of the time the layers took.  The two
ways take turns, and a ratio is of neighbours.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megatron_lance.checkpoint.hf_lance import RandomSource, load_weights
from megatron_lance.config.schema import ModelConfig, ParallelConfig
from megatron_lance.data.sizes import vae_grid, vit_grid, vit_size
from megatron_lance.model.lance_model import build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.objectives.random_values import FilledPack
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.sampling.flow_sampler import Request, SamplerSettings, initial_noise, sample, timesteps
from megatron_lance.sampling.passes import ModelPasses
from megatron_lance.sampling.velocity import ModelVelocity

SUMMARY = "sampling with and without the cache of the clean context: a picture edit, a clip, a clip's edit"
SYSTEM_TOKENS, CAPTION_TOKENS, VOCABULARY = 80, 40, 4096
HEAD = 128  # channels, as in the 3B model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--layers", type=int, default=2, help="dual-expert layers")
    parser.add_argument("--hidden", type=int, default=512, help=f"channels, a multiple of {2 * HEAD}")
    parser.add_argument("--side", type=int, default=256, help="pixels of a square picture or frame, a multiple of 16")
    parser.add_argument("--frames", type=int, default=9, help="of clips, 4k+1")
    parser.add_argument("--steps", type=int, default=8, help="Euler steps")
    parser.add_argument("--scale", type=float, default=4.0, help="guidance scale on text; 1 leaves that branch out")
    parser.add_argument("--repeats", type=int, default=5, help="samplings of each way")


def _now() -> float:
    """Seconds by a clock; on a CPU the process's own time, which other processes do not lengthen."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _in_layers(stages: Sequence[torch.nn.Module]) -> Iterator[list[float]]:
    """Times spent in the stages' layers, one entry a pass; on a GPU it waits for the device around them."""
    spent: list[float] = []
    hooks = []
    for stage in stages:
        decoder = stage.get_submodule("decoder")
        hooks.append(decoder.register_forward_pre_hook(lambda *_: spent.append(-_now())))
        hooks.append(decoder.register_forward_hook(lambda *_: spent.append(spent.pop() + _now())))
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (20, 50, 80)}


def _model(layers: int, hidden: int) -> ModelConfig:
    """Few layers of the 3B model's proportions."""
    return replace(
        ModelConfig(),
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=hidden * 43 // 8,
        num_attention_heads=hidden // HEAD,
        vocab_size=VOCABULARY,
        rope_inv_freq_dtype="float32",
    )


def _request(task: Task, side: int, frames: int, model: ModelConfig) -> Request:
    """A request of the chat template's shape with random conditions; an edit's target is as large as its source."""
    grid = vae_grid(frames, (side, side))
    source: tuple[Segment, ...] = ()
    if task.is_edit:
        looked_at = vit_grid(frames, vit_size(side, side, side))
        source = (Segment.visual(SegmentKind.VIT, looked_at), Segment.visual(SegmentKind.CLEAN, grid))
    segments = (
        Segment.text(SYSTEM_TOKENS),
        *source,
        Segment.text(CAPTION_TOKENS + 5),
        Segment.visual(SegmentKind.NOISE, grid),
    )
    before = SYSTEM_TOKENS + sum(segment.length for segment in source)
    shape = Sample(f"{task} {side} {frames}", task, segments, (), (before, before + CAPTION_TOKENS))
    sizes = {"hidden": model.hidden_size, "channels": model.latent_channels, "vocabulary": VOCABULARY}
    values = FilledPack.random(Pack((shape,), shape.length), **sizes, seed=1)
    return Request(shape, values.tokens.token_ids, values.visuals.latents, values.visuals.vit)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure on one rank."""
    model, parallel = _model(args.layers, args.hidden), ParallelConfig()
    groups = parallel_groups.initialize(parallel, seed=1)
    try:
        stages = build_stages(transformer_config(model, parallel, "float32"), model, VOCABULARY)
        load_weights(stages, RandomSource(1, model), model, tp_rank=0, tp=1)
        passes = ModelPasses(stages, model, groups, parallel.region_alignment)
        settings = SamplerSettings(steps=args.steps, scale=args.scale)
        load = os.getloadavg()[0]
        cases = {"edit of a picture": (Task.I_EDIT, 1), "clip": (Task.T2V, args.frames)}
        cases["edit of a clip"] = (Task.V_EDIT, args.frames)
        return {
            "layers": args.layers,
            "hidden": args.hidden,
            "side": args.side,
            "frames": args.frames,
            "steps": args.steps,
            "guided_steps": int((timesteps(args.steps, settings.shift)[:-1] > settings.interval[0]).sum()),
            "threads": torch.get_num_threads(),
            "load_before": load,
            "clock": "wall" if torch.cuda.is_available() else "process",
            "cases": {
                name: _measure(_request(task, args.side, frames, model), passes, settings, args.repeats)
                for name, (task, frames) in cases.items()
            },
        }
    finally:
        parallel_groups.destroy()


def _measure(request: Request, passes: ModelPasses, settings: SamplerSettings, repeats: int) -> dict[str, Any]:
    """Both ways of a case: seconds of each sampling, their ratios, and the share of the time that layers took."""
    ways = {True: "cached", False: "uncached"}
    seconds: dict[bool, list[float]] = {way: [] for way in ways}
    layers: dict[bool, float] = dict.fromkeys(ways, 0.0)
    results: dict[bool, torch.Tensor] = {}
    for turn in range(repeats + 1):
        for way in ways:
            noise = initial_noise([request], passes.model.latent_channels, 1)
            once = replace(settings, steps=1) if turn == 0 else settings  # the first turn warms up
            with _in_layers(passes.stages) as spent:
                start = _now()
                (results[way],) = sample([request], noise, ModelVelocity(passes, way), once)
            if turn > 0:
                seconds[way].append(_now() - start)
                layers[way] += sum(spent)
    target = request.sample.segments[-1].length
    difference = (results[True] - results[False]).abs().max() / results[False].abs().max()
    return {
        "context_tokens": request.sample.length - target,
        "target_tokens": target,
        **{f"{name}_seconds": {**_percentiles(seconds[way]), "all": seconds[way]} for way, name in ways.items()},
        **{f"{name}_share_in_layers": layers[way] / sum(seconds[way]) for way, name in ways.items()},
        "ratio": _percentiles([slow / fast for slow, fast in zip(seconds[False], seconds[True], strict=True)]),
        "difference": float(difference),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['layers']} layers of width {result['hidden']}, {result['steps']} steps, {result['guided_steps']} of "
        f"them guided, {result['side']} x {result['side']} pixels, clips of {result['frames']} frames; "
        f"{result['threads']} threads, {result['clock']} time, load {result['load_before']:.1f} before",
        f"{'':<18} {'context':>8} {'target':>8} {'cached s':>9} {'in layers':>9} {'uncached s':>10} {'in layers':>9} "
        f"{'ratio p20':>9} {'p50':>6} {'p80':>6} {'difference':>10}",
    ]
    for name, found in result["cases"].items():
        ways = [(found[f"{way}_seconds"]["p50"], found[f"{way}_share_in_layers"]) for way in ("cached", "uncached")]
        ratio = found["ratio"]
        lines.append(
            f"{name:<18} {found['context_tokens']:8} {found['target_tokens']:8} {ways[0][0]:9.2f} {ways[0][1]:9.0%} "
            f"{ways[1][0]:10.2f} {ways[1][1]:9.0%} {ratio['p20']:9.2f} {ratio['p50']:6.2f} {ratio['p80']:6.2f} "
            f"{found['difference']:10.1e}"
        )
    return "\n".join(lines)
