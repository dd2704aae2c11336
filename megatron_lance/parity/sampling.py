"""Golden sampling cases: every Euler step of the reference, with guidance.

Station: files -> [request, noise, recorded steps] -> comparison.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_lance.packing.segment import SegmentKind
from megatron_lance.parity.compare import RELATIVE, Difference, relative
from megatron_lance.parity.golden import GoldenConfig, GoldenError, rebuild_samples
from megatron_lance.sampling.flow_sampler import Request, SamplerSettings, Velocity, sample


def sampling_files(folder: Path) -> list[Path]:
    """The sampling_*.json files of a folder.

    Raises:
        GoldenError: if there is none.
    """
    files = sorted(p for p in folder.glob("sampling_*.json") if p.with_suffix(".safetensors").is_file())
    if not files:
        raise GoldenError(f"golden folder {str(folder)!r}: has no sampling_*.json with its .safetensors")
    return files


def check_sampling(path: Path, config: GoldenConfig, velocity: Velocity) -> list[Difference]:
    """Run a recorded sampling case and compare x before every step, both velocities, and the result.

    Args:
        path: its .json file.
        config: of its folder.
        velocity: the model.
    """
    raw = json.loads(path.read_text())
    tensors = load_file(path.with_suffix(".safetensors"))
    whole = {**raw, "sample_lens": [sum(raw["split_lens"])]}
    rebuilt = rebuild_samples(whole, tensors, tensors, config.special)
    if len(rebuilt) != 1:
        raise ValueError(f"{path.name}: {len(rebuilt)} samples; a sampling case has one")
    vit, clean = [torch.zeros(0, config.model.hidden_size)], [torch.zeros(0, config.model.latent_channels)]
    visual = [segment for segment in rebuilt[0].sample.segments if segment.is_visual]
    for segment, key in zip(visual, rebuilt[0].keys, strict=True):
        (vit if segment.kind is SegmentKind.VIT else clean).append(tensors[key].flatten(end_dim=-2))
    request = Request(rebuilt[0].sample, torch.tensor(rebuilt[0].ids), torch.cat(clean), torch.cat(vit))
    settings = SamplerSettings(
        steps=raw["steps"],
        shift=raw["timestep_shift"],
        scale=raw["cfg_text_scale"],
        interval=tuple(raw["cfg_interval"]),
        renorm=raw["cfg_renorm"][0],
        renorm_min=raw["cfg_renorm"][1],
    )
    target = request.target_rows
    calls: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

    def recorded(requests: Sequence[Request], xs: Sequence[torch.Tensor], t: float) -> list[torch.Tensor]:
        result = velocity(requests, xs, t)
        calls.append((xs[0].clone(), result))
        return result

    latents = sample([request], [tensors["x_T_noise_all_vae_tokens"]], recorded, settings)
    # the reference records the latents of every VAE block, the target's last
    last = max((key for key in tensors if key.startswith("x_0_latent/")), key=lambda key: int(key.split("/")[1]))
    worst = {"x": 0.0, "v_cond": 0.0, "v_uncond": 0.0, "latent": relative(latents[0], tensors[last])}
    for step, (x, velocities) in enumerate(calls):
        worst["x"] = max(worst["x"], relative(x, tensors[f"step{step}/x_t_all_vae_tokens"]))
        for name, v in zip(("v_cond", "v_uncond"), velocities, strict=False):
            recorded_v = tensors[f"step{step}/{name}"]
            theirs = recorded_v if len(recorded_v) == int(target.sum()) else recorded_v[target]
            worst[name] = max(worst[name], relative(v[target], theirs))
    return [Difference(f"sampling {name}", value, RELATIVE) for name, value in worst.items()]
