#!/usr/bin/env python
"""Generate pictures and clips from captions with classifier-free guidance.

    python tools/sample.py --config FILE --weights DIR --prompt "A red circle on the left." --size 64x64 --out samples

    torchrun --nproc-per-node 2 tools/sample.py ... parallel.tensor_model_parallel_size=2

--prompts takes a JSONL file with one {"caption": ..., "task": "t2i" | "t2v"} per line.  Writes 0000.png or 0000.mp4 per
sample, samples.jsonl and contact_sheet.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_lance.checkpoint.hf_lance import FolderSource, load_weights, with_rope_of
from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.loader import load_config
from megatron_lance.config.logs import set_up_logging
from megatron_lance.config.schema import RunConfig
from megatron_lance.config.validate import validate
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.sizes import vae_grid
from megatron_lance.encoders.vae import VideoAutoencoder, build_vae
from megatron_lance.model.lance_model import build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.groups import Groups
from megatron_lance.sampling.flow_sampler import SamplerSettings, initial_noise, sample
from megatron_lance.sampling.media import Frames, contact_sheet, to_frames, write_mp4, write_png
from megatron_lance.sampling.requests import text_to_visual
from megatron_lance.sampling.velocity import ModelVelocity

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="of the run; later ones win")
    parser.add_argument("--weights", required=True, metavar="DIR", help="folder in the public layout")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one caption")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="JSONL of captions and tasks")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    parser.add_argument("--size", default="768x768", metavar="HxW", help="pixels, multiples of 16")
    parser.add_argument(
        "--frames", type=int, default=1, help="frames, 4k+1; 1 is a picture; for t2v lines and --prompt"
    )
    parser.add_argument("--steps", type=int, default=30, help="Euler steps")
    parser.add_argument("--shift", type=float, default=3.5, help="timestep shift")
    parser.add_argument("--scale", type=float, default=4.0, help="guidance scale; 1 turns guidance off")
    parser.add_argument("--renorm", default="global", choices=["global", "channel", "none"], help="guidance renorm")
    parser.add_argument("--seed", type=int, default=0, help="addresses the initial noise")
    parser.add_argument("--batch", type=int, default=16, help="samples per forward pass")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example model.mape=none")
    return parser.parse_intermixed_args()


def read_prompts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Captions with their tasks and frames.

    Raises:
        UserError: naming the line that is not a caption for a picture or clip.
    """
    if options.prompt is not None:
        return [{"caption": options.prompt, "frames": options.frames}]
    if not options.prompts.is_file():
        raise UserError(f"--prompts {options.prompts}: there is no such file; give a JSONL of captions")
    rows = []
    for number, line in enumerate(options.prompts.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            task, caption = row.get("task", "t2i"), row["caption"]
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise UserError(
                f"--prompts {options.prompts} line {number}: is no object with a caption ({error!r})"
            ) from None
        if task not in ("t2i", "t2v"):
            raise UserError(f"--prompts {options.prompts} line {number}: task {task!r}; this tool samples t2i and t2v")
        rows.append({**row, "caption": caption, "frames": options.frames if task == "t2v" else 1})
    if not rows:
        raise UserError(f"--prompts {options.prompts}: is empty; give one caption a line")
    return rows


def _pixels(options: argparse.Namespace) -> tuple[int, int]:
    try:
        height, width = (int(side) for side in options.size.split("x"))
    except ValueError:
        raise UserError(f"--size {options.size!r}: must be HxW in pixels, for example 480x848") from None
    if height % 16 or width % 16 or height < 16 or width < 16:
        raise UserError(f"--size {options.size!r}: both sides must be positive multiples of 16")
    if options.frames < 1 or options.frames % 4 != 1:
        raise UserError(f"--frames {options.frames}: must be 4k+1, for example 1, 5, 9 or 73")
    return height, width


def generate(
    run: RunConfig, options: argparse.Namespace, rows: list[dict[str, Any]], groups: Groups, weights: FolderSource
) -> list[Frames]:
    """Frames of every caption, in order; all ranks compute alike."""
    tokenizer, size = Tokenizer(run.data.tokenizer), _pixels(options)
    config = transformer_config(run.model, run.parallel, run.training.precision)
    stages = build_stages(config, run.model, tokenizer.size)
    load_weights(stages, weights, run.model, tp_rank=groups.tp_rank, tp=groups.tp)
    velocity = ModelVelocity(stages, run.model, groups, run.parallel.region_alignment)
    vae: VideoAutoencoder = build_vae(run.encoders, run.model.latent_channels, run.training.seed).to(groups.device)
    settings = SamplerSettings(options.steps, options.shift, options.scale, renorm=options.renorm)
    frames: list[Frames] = []
    starts = range(0, len(rows), options.batch)
    for start in tqdm(starts, desc="sample", unit="batch", disable=dist.get_rank() != 0):
        requests = [
            text_to_visual(
                f"sample {start + i}",
                row["caption"],
                vae_grid(row["frames"], size),
                tokenizer,
                run.data.prompts,
                run.model.latent_channels,
            )
            for i, row in enumerate(rows[start : start + options.batch])
        ]
        noise = initial_noise(requests, run.model.latent_channels, options.seed)
        latents = sample(requests, noise, velocity, settings)
        frames += [to_frames(vae.decode(latent.to(groups.device)).cpu()) for latent in latents]
    return frames


def write(out: Path, rows: list[dict[str, Any]], samples: list[Frames], fps: float) -> None:
    """Files of all samples, samples.jsonl and the contact sheet."""
    out.mkdir(parents=True)
    with (out / "samples.jsonl").open("w", encoding="utf-8") as lines:
        for number, (row, frames) in enumerate(zip(rows, samples, strict=True)):
            name = f"{number:04d}.png" if len(frames) == 1 else f"{number:04d}.mp4"
            if len(frames) == 1:
                write_png(out / name, frames[0], row["caption"])
            else:
                write_mp4(out / name, frames, fps, row["caption"])
            lines.write(json.dumps({**row, "file": name}, ensure_ascii=False) + "\n")
    pairs = [(frames, row["caption"]) for frames, row in zip(samples, rows, strict=True)]
    contact_sheet(pairs[:64], columns=8).save(out / "contact_sheet.png")


def main() -> int:
    """Sample and write; returns the exit code."""
    options = parse_arguments()
    set_up_logging(first_rank=os.environ.get("RANK", "0") == "0")
    run = load_config(options.config, options.overrides)
    # a resolved training configuration carries its layout and batch; sampling has its own
    run = replace(run, training=replace(run.training, global_batch_size=int(os.environ.get("WORLD_SIZE", "1"))))
    validate(run, int(os.environ.get("WORLD_SIZE", "1")))
    if not run.data.tokenizer:
        raise UserError("data.tokenizer '': is not set; give the folder, e.g. data.tokenizer=PATH")
    rows = read_prompts(options)
    height, width = _pixels(options)
    side, cells = run.model.latent_position_size, vae_grid(options.frames, (height, width))
    if (cells[0] - 1) * side**2 + (cells[1] - 1) * side + cells[2] > run.model.latent_position_frames * side**2:
        raise UserError(
            f"--size {options.size} --frames {options.frames}: latent grid {cells} exceeds the model's position table "
            f"of {run.model.latent_position_frames} x {side} x {side}; choose a smaller size or fewer frames"
        )
    run = replace(run, model=with_rope_of(run.model, options.weights))
    if options.out.exists():
        raise UserError(f"--out {options.out}: exists; give a new folder")
    weights = FolderSource(options.weights, run.model)
    if run.encoders.vae == "wan" and not run.encoders.vae_path:
        logger.warning("encoders.vae_path is empty: latents are decoded by a small random VAE; give its folder")
    groups = parallel_groups.initialize(run.parallel, run.training.seed)
    samples = generate(run, options, rows, groups, weights)
    if dist.get_rank() == 0:
        write(options.out, rows, samples, run.data.target_fps)
        print(f"{len(samples)} samples in {options.out}, contact sheet {options.out / 'contact_sheet.png'}")
    parallel_groups.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(run_command("sample", main))
