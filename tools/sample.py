#!/usr/bin/env python
"""Sample pictures, clips, edits and answers.

    python tools/sample.py --config FILE --weights DIR --prompt "A red circle on the left." --size 64x64 --out samples

    torchrun --nproc-per-node 2 tools/sample.py ... parallel.tensor_model_parallel_size=2

--weights takes a folder in the public layout, a run's folder or one of its checkpoints.  --prompts takes a JSONL; what
its lines may say is at the top of megatron_lance/sampling/prompt_list.py, what --layout means at that of layouts.py.
Writes a file per sample, samples.jsonl with files and answers, and contact_sheet.png; --resume goes on with a folder
that is not finished, killed or not.  All lines are looked through before the first is sampled.  Replicas share them
out.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_lance.checkpoint.everywhere import faults, first_ranks
from megatron_lance.checkpoint.hf_lance import FolderSource, WeightSource, check_shapes, load_weights, with_rope_of
from megatron_lance.checkpoint.manifest import Checkpoint, checkpoint_at, damage, names_checkpoint
from megatron_lance.checkpoint.view import CheckpointView
from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.loader import load_config
from megatron_lance.config.logs import set_up_logging
from megatron_lance.config.schema import ModelConfig, RunConfig
from megatron_lance.config.validate import validate
from megatron_lance.data.decode import MediaDecoder
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.encoders.vae import build_vae
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.model.lance_model import build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Task
from megatron_lance.packing.segment import VAE_KINDS
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.groups import Groups
from megatron_lance.sampling.batches import HowToSample, Item, rounds, sample_round
from megatron_lance.sampling.engine import Encoders, Engine
from megatron_lance.sampling.flow_sampler import SamplerSettings
from megatron_lance.sampling.layouts import LAYOUTS, check_places
from megatron_lance.sampling.passes import ModelPasses
from megatron_lance.sampling.prompt_list import (
    Defaults,
    Line,
    check_frames,
    check_grid,
    check_sizes,
    parse_line,
    parse_size,
    read_list,
)
from megatron_lance.sampling.requests import PromptPlanner
from megatron_lance.sampling.results import Results
from megatron_lance.sampling.text_decoder import DecoderSettings

logger = logging.getLogger(__name__)

DECIDING = (
    "ema layout size frames steps shift scale visual_scale renorm max_tokens top_p temperature understanding_mape seed"
).split()
"""Options that decide the samples."""
DECIDING_DATA = (
    "prompts tokenizer vae_resolution vit_resolution vae_sides vit_sides target_fps frame_sampling "
    "max_seconds_generation max_seconds_understanding"
).split()
"""Fields of the configuration's data section that do."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="of the run; later ones win")
    parser.add_argument("--weights", required=True, metavar="DIR", help="public layout, run or checkpoint")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of a run or checkpoint")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one caption, instruction or question")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="JSONL of prompts")
    parser.add_argument("--media", nargs="+", default=[], metavar="FILE", help="conditions of --prompt, in order")
    parser.add_argument("--task", choices=[str(task) for task in Task], help="of --prompt and of lines without one")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--resume", action="store_true", help="go on with --out where it stopped")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="flat", help="folder layout of a benchmark")
    parser.add_argument("--copies", type=int, help="samples per prompt (default: the layout's)")
    parser.add_argument("--size", metavar="HxW", help="pixels, multiples of 16; an edit takes its source's")
    parser.add_argument("--frames", type=int, help="frames of a clip, 4k+1; an edit takes its source's")
    parser.add_argument("--steps", type=int, default=30, help="Euler steps")
    parser.add_argument("--shift", type=float, default=3.5, help="timestep shift")
    parser.add_argument("--scale", type=float, default=4.0, help="guidance scale on text; 1 turns it off")
    parser.add_argument("--visual-scale", type=float, default=1.0, help="guidance scale on visual conditions")
    parser.add_argument("--interval", type=float, nargs=2, default=(0.4, 1.0), help="guidance for t in (low, high]")
    parser.add_argument("--renorm", default="global", choices=["global", "channel", "none"], help="guidance renorm")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--top-p", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--temperature", type=float, default=1.0, help="of --top-p")
    parser.add_argument(
        "--understanding-mape", choices=["training", "none"], default="training", help="positions of questions"
    )
    parser.add_argument("--seed", type=int, default=0, help="addresses the noise of the first copy")
    parser.add_argument("--batch", type=int, default=16, help="samples per forward pass of a replica")
    parser.add_argument("--uncached", action="store_true", help="compute the context anew in every step")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.mape=none")
    return parser.parse_intermixed_args()


def read_lines(options: argparse.Namespace) -> list[Line]:
    """The prompts.

    Raises:
        UserError: naming what is wrong.
    """
    size = None if options.size is None else parse_size(options.size, "--size")
    frames = None if options.frames is None else check_frames(options.frames, "--frames")
    task = Task(options.task) if options.task else LAYOUTS[options.layout].task
    if options.prompts is not None:
        return read_list(options.prompts, Defaults(task, size, frames, options.seed), f"--prompts {options.prompts}")
    if task is None:
        task = Task.T2I if (frames or 1) == 1 else Task.T2V
    row: dict[str, Any] = {"caption": options.prompt, "images": options.media}
    return [parse_line(0, row, Path(), Defaults(task, size, frames, options.seed), "--prompt")]


class _CheckpointSource:
    """A checkpoint as a source of weights."""

    def __init__(self, view: CheckpointView) -> None:
        self.view = view

    def get(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of a public key."""
        return self.view.get(key)


def look_through(lines: Sequence[Line], run: RunConfig) -> None:
    """Plan every line, so that what is wrong with one is said before any is sampled.

    Raises:
        PromptError: naming the line whose media are none, do not fit its task, or have no place in the model.
    """
    planner = PromptPlanner(run.data, Tokenizer(run.data.tokenizer))
    for line in tqdm(lines, desc="look through", unit="line"):
        for plan in planner.plan(line.prompt(0, line.read_media())).visuals:
            if plan.segment.kind in VAE_KINDS and plan.segment.grid is not None:
                check_grid(plan.segment.grid, run.model, line.where)


def open_weights(folder: str, checkpoint: Checkpoint | None, model: ModelConfig, ema: bool) -> WeightSource:
    """Weights in the public layout, of a run or of a checkpoint; a collective of the world.

    Args:
        folder: that holds them.
        checkpoint: in it; None if it is in the public layout.
        model: sizes.
        ema: take a run's averaged weights.

    Raises:
        UserError: if there are none, they are damaged or they do not fit the model.
    """
    if checkpoint is not None:
        size = sum(checkpoint.manifest.files.values())
        logger.info("holding the %.3g GB of %s against their digests", size / 1e9, checkpoint.folder)
        if found := faults(checkpoint):
            raise damage(checkpoint, found)
        view = CheckpointView(checkpoint, ema=ema)
        check_shapes({key: spec.shape for key, spec in view.specs.items()}, model, f"checkpoint '{checkpoint.folder}'")
        return _CheckpointSource(view)
    if ema:
        raise UserError(f"--ema: '{folder}' is in the public layout and has one set of weights; leave --ema out")
    return FolderSource(folder, model, f"--weights {folder!r}")


def build_engine(run: RunConfig, groups: Groups, weights: WeightSource, cached: bool) -> Engine:
    """The model on this rank and the frozen parts."""
    tokenizer = Tokenizer(run.data.tokenizer)
    config = transformer_config(run.model, run.parallel, run.training.precision)
    stages = build_stages(config, run.model, tokenizer.size, run.ops.mape)
    load_weights(stages, weights, run.model, tp_rank=groups.tp_rank, tp=groups.tp)
    device_id = groups.device.index if groups.device.type == "cuda" else None
    seed = run.training.seed
    encoders = Encoders(
        MediaDecoder(run.data.decode, run.data.decode_threads, device_id),
        VitEncoder.build(run.encoders, run.model.hidden_size, seed).to(groups.device),
        build_vae(run.encoders, run.model.latent_channels, seed).to(groups.device),
    )
    return Engine(run, ModelPasses(stages, run.model, groups, row_alignment(run)), encoders, tokenizer, cached)


def how_to_sample(options: argparse.Namespace, model: ModelConfig) -> HowToSample:
    """The settings of both samplers.

    Raises:
        UserError: naming the one that is wrong.
    """
    return HowToSample(
        SamplerSettings(
            options.steps, options.shift, options.scale, options.visual_scale, tuple(options.interval), options.renorm
        ),
        DecoderSettings(options.max_tokens, options.top_p, options.temperature),
        Mape.NONE if options.understanding_mape == "none" else Mape(model.mape),
    )


def work_through(engine: Engine, how: HowToSample, size: int, work: Sequence[Item], results: Results | None) -> None:
    """Sample and write.

    Args:
        engine: of this rank.
        how: the settings.
        size: items per batch.
        work: lines and copies that are not done yet; the same on every rank.
        results: writes; None on all ranks but the first.
    """
    batches = rounds(work, size, engine.passes.groups.dp)
    for of_replicas in tqdm(batches, desc="sample", unit="round", disable=results is None):
        for (line, copy), result in sample_round(engine, of_replicas, how):
            if results is not None:
                results.add(line, copy, result)


def settings_of(options: argparse.Namespace, copies: int, run: RunConfig, weights: str) -> dict[str, Any]:
    """What decides the samples of a folder; more copies may be added to all but grids.

    Args:
        options: the command line.
        copies: per prompt.
        run: the configuration.
        weights: the folder they are from.
    """
    data = asdict(run.data)
    return {
        "weights": weights,
        **{name: getattr(options, name) for name in DECIDING},
        "interval": list(options.interval),
        **({"copies": copies} if LAYOUTS[options.layout].grid else {}),
        "precision": run.training.precision,
        **{f"model.{name}": value for name, value in asdict(run.model).items() if name != "attention_backend"},
        **{f"encoders.{name}": value for name, value in asdict(run.encoders).items()},
        **{f"data.{name}": data[name] for name in DECIDING_DATA},
    }


def main() -> int:
    """Sample and write; returns the exit code."""
    options = parse_arguments()
    first, world_size = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1"))
    set_up_logging(first_rank=first)
    run = load_config(options.config, options.overrides)
    # a resolved training configuration carries its layout and batch; sampling has its own
    run = replace(run, training=replace(run.training, global_batch_size=world_size))
    validate(run, world_size)
    if not run.data.tokenizer:
        raise UserError("data.tokenizer '': is not set; give the folder, e.g. data.tokenizer=PATH")
    lines = read_lines(options)
    check_sizes(lines, run.model)
    layout = LAYOUTS[options.layout]
    copies = layout.copies if options.copies is None else options.copies
    if copies < 1:
        raise UserError(f"--copies {copies}: must be at least 1; give the samples per prompt")
    if options.batch < 1:
        raise UserError(f"--batch {options.batch}: must be at least 1; give the samples per forward pass")
    how = how_to_sample(options, run.model)
    check_places(lines, layout, copies)
    if options.out.exists() and not options.resume:
        raise UserError(f"--out {options.out}: exists; give a new folder, or --resume to go on with it")
    run = replace(run, model=with_rope_of(run.model, options.weights))
    if run.encoders.vae == "wan" and not run.encoders.vae_path:
        logger.warning("encoders.vae_path is empty: latents are decoded by a small random VAE; give its folder")
    groups = parallel_groups.initialize(run.parallel, run.training.seed)
    first_ranks(lambda: look_through(lines, run))
    folder = Path(options.weights)  # a run may save at this moment
    checkpoint = first_ranks(lambda: checkpoint_at(folder)) if names_checkpoint(folder) else None
    weights = open_weights(options.weights, checkpoint, run.model, options.ema)
    settings = settings_of(options, copies, run, str(checkpoint.folder) if checkpoint else options.weights)
    results = Results(options.out, layout, copies, run.data.target_fps, lines) if first else None
    finished = first_ranks(lambda: results.open(settings) if results is not None else set())
    work = [(line, copy) for line in lines for copy in range(copies) if (line.number, copy) not in finished]
    engine = build_engine(run, groups, weights, not options.uncached)
    work_through(engine, how, options.batch, work, results)
    if results is not None:
        results.finish()
        print(f"{len(lines) * copies} samples in {options.out}")
    parallel_groups.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(run_command("sample", main))
