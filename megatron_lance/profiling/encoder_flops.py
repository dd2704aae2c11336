"""FLOPs of the frozen encoders; they run forward only.

Station: grids of visual segments -> [FLOPs] -> throughput report, planner.

ViT, per clip of T x H x W tokens after the 2 x 2 merge (n = 4 T H W patches; d width, i MLP width, p pixels and r
frames of a patch, o output width):

    patches     2 n 3 r p p d
    a block     2 n (4 d d + 3 d i) + 4 d pairs; pairs are T (4 H W)^2 where a block sees whole frames, else the sum
                over windows of a x b tokens of (4 a b)^2 in each of T frames
    merger      2 T H W (16 d d + 4 d o)

VAE: a causal video autoencoder of many convolutions.  Its FLOPs are counted once with torch's counter on tensors
without data and continued exactly: a frame costs A area + B area^2 (convolutions and the one attention), the first
latent frame and every later one with their own A and B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_lance.encoders.vae import SPATIAL, TEMPORAL, WAN22_CONFIG
from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import VAE_KINDS, SegmentKind

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class VitSizes:
    """Sizes of a Qwen2.5-VL vision encoder; the defaults are those of Qwen2.5-VL-3B's.

    Attributes:
        hidden: d.
        intermediate: i.
        depth: blocks.
        full_blocks: of them, those that see whole frames.
        window: tokens along each side of a window.
        patch: pixels along each side of a patch.
        frames: of a patch.
        out: o.
    """

    hidden: int = 1280
    intermediate: int = 3420
    depth: int = 32
    full_blocks: int = 4
    window: int = 4
    patch: int = 14
    frames: int = 2
    out: int = 2048

    @classmethod
    def of(cls, config: Any) -> VitSizes:
        """From transformers' Qwen2_5_VLVisionConfig."""
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            depth=config.depth,
            full_blocks=len(config.fullatt_block_indexes),
            window=config.window_size // config.spatial_merge_size // config.patch_size,
            patch=config.patch_size,
            frames=config.temporal_patch_size,
            out=config.out_hidden_size,
        )


def _sum_of_squares(side: int, window: int) -> int:
    """Of the lengths of the windows that tile a side."""
    return side // window * window**2 + (side % window) ** 2


def vit_flops(sizes: VitSizes, grid: Grid) -> float:
    """Forward FLOPs of one clip.

    Args:
        sizes: of the encoder.
        grid: (T, H, W) tokens after the merge.
    """
    t, h, w = grid
    tokens, d = t * h * w, sizes.hidden
    patches = 4 * tokens
    whole = t * (4 * h * w) ** 2
    windowed = 16 * t * _sum_of_squares(h, sizes.window) * _sum_of_squares(w, sizes.window)
    pairs = sizes.full_blocks * whole + (sizes.depth - sizes.full_blocks) * windowed
    embedding = 2.0 * patches * 3 * sizes.frames * sizes.patch**2 * d
    blocks = 2.0 * patches * (4 * d * d + 3 * d * sizes.intermediate) * sizes.depth + 4.0 * d * pairs
    return embedding + blocks + 2.0 * tokens * (16 * d * d + 4 * d * sizes.out)


def _counted(settings: Mapping[str, Any], latent_frames: int, side: int) -> float:
    """FLOPs of the autoencoder's encoder by torch's counter, on tensors without data."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLWan(**settings)
        frames = TEMPORAL * (latent_frames - 1) + 1
        pixels = torch.empty(1, 3, frames, SPATIAL * side, SPATIAL * side)
        with FlopCounterMode(display=False) as counter:
            vae.encode(pixels)
    return float(counter.get_total_flops())


@lru_cache(maxsize=8)
def _coefficients(settings: tuple[tuple[str, Any], ...]) -> tuple[tuple[float, float], tuple[float, float]]:
    """(A, B) of the first latent frame and of every later one; area in latent cells."""
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in settings}
    small, large = 2, 4
    first = [_counted(kept, 1, side) for side in (small, large)]
    later = [_counted(kept, 2, side) - known for side, known in zip((small, large), first, strict=True)]

    def solve(a: float, b: float) -> tuple[float, float]:
        x, y = small**2, large**2
        square = (b / y - a / x) / (y - x)
        return a / x - square * x, square

    return solve(*first), solve(*later)


def vae_flops(grid: Grid, settings: Mapping[str, Any] = WAN22_CONFIG) -> float:
    """Forward FLOPs of encoding one picture or clip.

    Args:
        grid: (T, H, W) latent cells.
        settings: of diffusers' AutoencoderKLWan; Wan2.2's by default.
    """
    frozen = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in settings.items())
    first, later = _coefficients(frozen)
    t, h, w = grid
    area = h * w
    return sum(count * (a * area + b * area**2) for count, (a, b) in ((1, first), (t - 1, later)))


def encoder_flops(pack: Pack, vit: VitSizes | None = None) -> dict[str, float]:
    """Forward FLOPs of both encoders for all visual segments of a pack: by "vit" and "vae"."""
    sizes = vit or VitSizes()
    found = {"vit": 0.0, "vae": 0.0}
    for placed in pack.visual_segments(SegmentKind.VIT, *VAE_KINDS):
        grid = placed.segment.grid or (0, 0, 0)
        if placed.segment.kind is SegmentKind.VIT:
            found["vit"] += vit_flops(sizes, grid)
        else:
            found["vae"] += vae_flops(grid)
    return found
