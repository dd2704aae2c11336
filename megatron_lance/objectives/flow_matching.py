"""Timesteps and noise of a pack, addressed by sample (spec/model.md section 5).

Station: encoders -> [noising] -> embedder.  t = 1 is noise: x_t = (1 - t) * data + t * noise, target = noise - data.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_lance.packing.batch import PackNoise
from megatron_lance.packing.rng import stream
from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import VAE_KINDS, SegmentKind


def shift_timestep(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Move timesteps towards noise: t <- s*t / (1 + (s-1)*t), for training and sampling alike."""
    return shift * t / (1 + (shift - 1) * t)


def _draw_timestep(rng: np.random.Generator, distribution: str) -> torch.Tensor:
    """One float32 timestep before the shift, in [0, 1]."""
    if distribution == "logit_normal":
        return torch.sigmoid(torch.tensor(rng.standard_normal(), dtype=torch.float32))
    if distribution == "uniform":
        return torch.tensor(rng.random(), dtype=torch.float32)
    raise ValueError(f"objective.timestep_distribution {distribution!r}: choose logit_normal or uniform")


def loss_rows(pack: Pack) -> torch.Tensor:
    """Bool [N_vae], pack order: noisy rows that are not frame conditions."""
    rows: list[np.ndarray] = [np.zeros(0, dtype=bool)]
    for placed in pack.visual_segments(*VAE_KINDS):
        grid = placed.segment.grid or (0, 0, 0)
        keep = np.full(grid, placed.segment.kind is SegmentKind.NOISE)
        keep[list(placed.segment.clean_frames)] = False
        rows.append(keep.reshape(-1))
    return torch.from_numpy(np.concatenate(rows))


def draw_noise(
    pack: Pack, epochs: tuple[int, ...], channels: int, *, seed: int, shift: float, distribution: str
) -> PackNoise:
    """Timesteps and noise of a pack; functions of (seed, sample id, epoch, segment) and nothing else.

    One timestep per noisy segment, shared by its tokens; clean segments and frame conditions have t = 0.

    Args:
        pack: the structure.
        epochs: epoch of each sample of the pack.
        channels: latent channels.
        seed: the run's seed.
        shift: the stage's timestep shift.
        distribution: logit_normal or uniform.

    Returns:
        float32 values in pack order.
    """
    mask = loss_rows(pack)
    timesteps = torch.zeros(len(mask))
    noise = torch.zeros(len(mask), channels)
    at = 0
    for placed in pack.visual_segments(*VAE_KINDS):
        rows = slice(at, at + placed.segment.content_length)
        at = rows.stop
        if placed.segment.kind is not SegmentKind.NOISE:
            continue
        address = (pack.samples[placed.sample_index].sample_id, epochs[placed.sample_index], placed.segment_index)
        t = shift_timestep(_draw_timestep(stream(seed, "timestep", *address), distribution), shift)
        timesteps[rows] = torch.where(mask[rows], t, 0.0)
        values = stream(seed, "noise", *address).standard_normal((rows.stop - rows.start, channels), dtype=np.float32)
        noise[rows] = torch.from_numpy(values)
    return PackNoise(timesteps, noise, mask)
