#!/usr/bin/env python
"""Sample pictures, clips, edits and answers.

    python tools/sample.py --config FILE --weights DIR --prompt "A red circle on the left." --size 64x64 --out samples

    torchrun --nproc-per-node 2 tools/sample.py ... parallel.tensor_model_parallel_size=2

--weights takes a folder in the public layout, a run's folder or one of its checkpoints.  --prompts takes a JSONL; what
its lines may say is at the top of megatron_lance/sampling/prompt_list.py.  Writes a file per sample, samples.jsonl with
files and answers, and contact_sheet.png; --resume goes on with a folder that is not finished.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from megatron_lance.checkpoint.hf_lance import FolderSource, WeightSource, load_weights, with_rope_of
from megatron_lance.checkpoint.manifest import checkpoint_at, names_checkpoint
from megatron_lance.checkpoint.view import CheckpointView
from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.loader import load_config
from megatron_lance.config.logs import set_up_logging
from megatron_lance.config.schema import ModelConfig, RunConfig
from megatron_lance.config.validate import validate
from megatron_lance.data.decode import MediaDecoder
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.sizes import vae_grid
from megatron_lance.encoders.vae import build_vae
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.model.lance_model import build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Task
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.groups import Groups
from megatron_lance.sampling.engine import Encoders, Engine
from megatron_lance.sampling.flow_sampler import SamplerSettings
from megatron_lance.sampling.media import Frames, contact_sheet, picture_grid, write_mp4, write_png
from megatron_lance.sampling.passes import ModelPasses
from megatron_lance.sampling.prompt_list import (
    LAYOUTS,
    Defaults,
    Layout,
    Line,
    check_frames,
    parse_line,
    parse_size,
    read_list,
)
from megatron_lance.sampling.text_decoder import DecoderSettings

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
SHEET_SAMPLES, SHEET_COLUMNS = 64, 8


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
    parser.add_argument("--batch", type=int, default=16, help="samples per forward pass")
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
        return read_list(options.prompts, Defaults(task, size, frames, options.seed))
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


def open_weights(folder: str, model: ModelConfig, ema: bool) -> WeightSource:
    """Weights in the public layout, of a run or of a checkpoint.

    Args:
        folder: that holds them.
        model: sizes.
        ema: take a run's averaged weights.

    Raises:
        UserError: if there are none or they do not fit the model.
    """
    if names_checkpoint(Path(folder)):
        return _CheckpointSource(CheckpointView(checkpoint_at(Path(folder)), ema=ema))
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
    return Engine(
        run, ModelPasses(stages, run.model, groups, run.parallel.region_alignment), encoders, tokenizer, cached
    )


def _batches(work: Sequence[tuple[Line, int]], size: int) -> Iterator[list[tuple[Line, int]]]:
    """Neighbours of one kind (generation or understanding), at most `size` together."""
    batch: list[tuple[Line, int]] = []
    for item in work:
        if batch and (len(batch) == size or batch[0][0].task.is_generation != item[0].task.is_generation):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _generate(engine: Engine, batch: list[tuple[Line, int]], settings: SamplerSettings) -> list[Frames]:
    """The last turn's frames of every item; a turn's result is the source of the next."""
    media = [tuple(path.read_bytes() for path in line.media) for line, _ in batch]
    frames: list[Frames] = [np.zeros((0, 0, 0, 3), np.uint8)] * len(batch)
    for turn in range(max(len(line.texts) for line, _ in batch)):
        going = [i for i, (line, _) in enumerate(batch) if turn < len(line.texts)]
        prompts = [batch[i][0].prompt(turn, media[i]) for i in going]
        seeds = [batch[i][0].seed + batch[i][1] for i in going]
        for i, made in zip(going, engine.generate(prompts, seeds, settings), strict=True):
            frames[i], media[i] = made, (engine.as_medium(made),)
    return frames


class Results:
    """The folder that is written; only the first rank writes.

    Args:
        out: the folder.
        layout: where files go.
        copies: per prompt.
        fps: of clips.
        enabled: False on all ranks but the first.
    """

    def __init__(self, out: Path, layout: Layout, copies: int, fps: float, enabled: bool) -> None:
        self.out, self.layout, self.copies, self.fps, self.enabled = out, layout, copies, fps, enabled
        self.grids: dict[int, list[Frames]] = {}

    def done(self) -> set[int]:
        """Numbers of the lines that a run before has finished."""
        file = self.out / SAMPLES_FILE
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        counts: dict[int, int] = {}
        for text in lines:
            number = json.loads(text)["line"]
            counts[number] = counts.get(number, 0) + 1
        wanted = 1 if self.layout.grid else self.copies
        return {number for number, count in counts.items() if count >= wanted}

    def _note(self, line: Line, copy: int, **found: str) -> None:
        with (self.out / SAMPLES_FILE).open("a", encoding="utf-8") as lines:
            row = {**line.row, "task": str(line.task), "line": line.number, "copy": copy, **found}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def answer(self, line: Line, copy: int, text: str) -> None:
        """Note an answer."""
        if self.enabled:
            self._note(line, copy, answer=text)

    def frames(self, line: Line, copy: int, frames: Frames) -> None:
        """Write a picture or clip; the copies of a grid wait for one another."""
        if not self.enabled:
            return
        if self.layout.grid:
            together = self.grids.setdefault(line.number, [])
            together.append(frames)
            if len(together) < self.copies:
                return
            frames = picture_grid(self.grids.pop(line.number))
        suffix = ".png" if len(frames) == 1 else ".mp4"
        name = line.path(self.layout, copy, suffix, self.copies)
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = " | ".join(line.texts)
        if len(frames) == 1:
            write_png(path, frames[0], text)
        else:
            write_mp4(path, frames, self.fps, text)
        if self.layout.metadata:
            beside = self.out / self.layout.metadata.format(number=line.number)
            beside.write_text(json.dumps(line.row, ensure_ascii=False) + "\n", encoding="utf-8")
        self._note(line, copy, file=name)

    def sheet(self) -> None:
        """The contact sheet of the first samples, with answers below their questions' media left out."""
        rows = [json.loads(text) for text in (self.out / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()]
        shown = [row for row in rows if "file" in row][:SHEET_SAMPLES]
        pairs = [(_read(self.out / row["file"]), _text(row)) for row in shown]
        if pairs:
            contact_sheet(pairs, columns=SHEET_COLUMNS).save(self.out / "contact_sheet.png")


def _text(row: dict[str, Any]) -> str:
    return next(row[key] for key in ("caption", "prompt", "prompt_en", "instruction") if key in row)


def _read(path: Path) -> Frames:
    """A written sample."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path))[None]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def work_through(engine: Engine, options: argparse.Namespace, lines: Sequence[Line], results: Results) -> None:
    """Sample and write everything that is not done yet."""
    settings = SamplerSettings(
        options.steps, options.shift, options.scale, options.visual_scale, tuple(options.interval), options.renorm
    )
    decoder = DecoderSettings(options.max_tokens, options.top_p, options.temperature, options.seed)
    mape = Mape.NONE if options.understanding_mape == "none" else engine.velocity.mape
    finished = results.done()
    work = [(line, copy) for line in lines if line.number not in finished for copy in range(results.copies)]
    for batch in tqdm(list(_batches(work, options.batch)), desc="sample", unit="batch", disable=not results.enabled):
        if batch[0][0].task.is_generation:
            for (line, copy), frames in zip(batch, _generate(engine, batch, settings), strict=True):
                results.frames(line, copy, frames)
        else:
            prompts = [line.prompt(0, tuple(path.read_bytes() for path in line.media)) for line, _ in batch]
            for (line, copy), text in zip(batch, engine.answer(prompts, decoder, mape), strict=True):
                results.answer(line, copy, text)


def _check_sizes(lines: Sequence[Line], model: ModelConfig) -> None:
    """Raise UserError where a target exceeds the model's position table."""
    side = model.latent_position_size
    for line in lines:
        if line.size is None:
            continue
        frames = 1 if line.task in (Task.T2I, Task.I_EDIT, Task.S2I) else line.frames or 1
        cells = vae_grid(frames, line.size)
        if (cells[0] - 1) * side**2 + (cells[1] - 1) * side + cells[2] > model.latent_position_frames * side**2:
            raise UserError(
                f"line {line.number + 1}: latent grid {cells} of size {line.size[0]}x{line.size[1]} and "
                f"{frames} frames exceeds the model's position table of {model.latent_position_frames} x "
                f"{side} x {side}; choose a smaller size or fewer frames"
            )


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
    _check_sizes(lines, run.model)
    if options.out.exists() and not options.resume:
        raise UserError(f"--out {options.out}: exists; give a new folder, or --resume to go on with it")
    run = replace(run, model=with_rope_of(run.model, options.weights))
    weights = open_weights(options.weights, run.model, options.ema)
    if run.encoders.vae == "wan" and not run.encoders.vae_path:
        logger.warning("encoders.vae_path is empty: latents are decoded by a small random VAE; give its folder")
    groups = parallel_groups.initialize(run.parallel, run.training.seed)
    layout = LAYOUTS[options.layout]
    results = Results(options.out, layout, options.copies or layout.copies, run.data.target_fps, first)
    if first:
        options.out.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine = build_engine(run, groups, weights, not options.uncached)
    work_through(engine, options, lines, results)
    if first:
        results.sheet()
        print(f"{len(lines) * results.copies} samples in {options.out}")
    parallel_groups.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(run_command("sample", main))
