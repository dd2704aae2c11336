"""Frozen video autoencoders with the reduction 16 x 16 x 4 (spec/model.md section 1).

Station: decode -> [VAE] -> noising; and back, latents -> pixels, in sampling.  In: a picture or clip.  Out: one latent
frame for the first frame and one per four frames after it, normalised per channel.

Two kinds share one interface: `WanAutoencoder` is Wan2.2's causal VAE; `BlockTransformCodec` has no weights and is for
trial runs, where a random VAE would give latents that nobody can look at.

Shapes: T = 4(t-1) + 1 frames, H = 16h, W = 16w pixels, C latent channels.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from einops import rearrange
from scipy.fft import dct

from megatron_lance.config.schema import EncoderConfig
from megatron_lance.encoders.public_wan import load_public_wan
from megatron_lance.encoders.weights import EncoderError, construct, draw_parameters, load_parameters, read_json

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

SPATIAL, TEMPORAL = 16, 4
"""Pixels per latent cell along height and along width; frames per latent frame after the first."""

# The published configuration of Wan2.2's VAE: Wan-AI/Wan2.2-TI2V-5B-Diffusers, vae/config.json.
# fmt: off
WAN22_CONFIG: dict[str, Any] = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0, "is_residual": True,
    "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_temporal": 4, "scale_factor_spatial": 16,
    "latents_mean": [
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ],
    "latents_std": [
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ],
}
# fmt: on
SMALL_WAN_DIMS = {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1}
"""What the small random model changes in WAN22_CONFIG, beside z_dim."""


class VideoAutoencoder(Protocol):
    """What the rest of the package knows of an autoencoder."""

    latent_channels: int

    def encode(self, pixels: torch.Tensor, generator: np.random.Generator | None = None) -> torch.Tensor:
        """Pixels [3, T, H, W] in -1..1 to float32 latents [t, h, w, C], about unit variance.

        `generator` is an addressed stream (packing/rng.py); only an autoencoder that samples its posterior reads it.
        """
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [t, h, w, C] to float32 pixels [3, T, H, W]."""
        ...

    def to(self, device: torch.device) -> VideoAutoencoder:
        """Move to `device`; inputs follow by themselves."""
        ...


def build_vae(config: EncoderConfig, latent_channels: int, seed: int) -> VideoAutoencoder:
    """The autoencoder that `config.vae` names.

    Args:
        config: kind, path, posterior, dtype.
        latent_channels: channels the model expects.
        seed: names the random weights; unused with a path and by the codec.

    Raises:
        EncoderError: if the folder lacks config.json or weights, the kind or posterior is unknown, or settings, weights
            and channels do not fit together.
    """
    if config.posterior not in ("mean", "sample"):
        raise EncoderError(f"encoders.posterior '{config.posterior}': unknown; use mean or sample")
    if config.vae == "wan":
        return WanAutoencoder.build(config, latent_channels, seed)
    if config.vae == "block_transform":
        if config.vae_path or config.posterior != "mean":
            raise EncoderError(
                f"encoders.vae_path '{config.vae_path}', encoders.posterior '{config.posterior}': block_transform has "
                "no weights and no posterior; leave the path empty and the posterior at mean"
            )
        return BlockTransformCodec(latent_channels)
    raise EncoderError(f"encoders.vae '{config.vae}': unknown; use wan or block_transform")


class WanAutoencoder(torch.nn.Module):
    """diffusers' AutoencoderKLWan in the Wan2.2 configuration, frozen.

    Clips go through latent frame by latent frame, with the causal cache of what was before, so memory does not grow
    with their length and the result is that of the whole clip.  Tiles bound the memory of large frames in decoding;
    there the result is another one, for a tile sees nothing beyond its edges.

    Not for use from two threads at once: the model keeps its causal cache in itself during a call.

    Args:
        vae: the model.
        sample_posterior: encode to a sample of the posterior instead of its mean.
        tile: pixels, side of the tiles that larger frames are decoded in, a multiple of 64; neighbours overlap by at
            least a quarter and are blended there.  0: whole frames.
    """

    def __init__(self, vae: AutoencoderKLWan, sample_posterior: bool, tile: int = 0):
        super().__init__()
        self.vae = vae
        self.latent_channels = int(vae.config["z_dim"])
        self.sample_posterior, self.tile = sample_posterior, tile

    @classmethod
    def build(cls, config: EncoderConfig, latent_channels: int, seed: int) -> WanAutoencoder:
        """From `config.vae_path` (diffusers' layout or the public file), or a small random one; see build_vae."""
        # Here, because a run with another autoencoder would start a second later.
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        path = Path(config.vae_path) if config.vae_path else None
        settings = _small_wan(latent_channels) if path is None else _read_wan(path, latent_channels)
        vae = construct(lambda: AutoencoderKLWan(**settings), config.dtype)
        if path is None:
            draw_parameters(vae, seed, "vae")
        elif path.suffix == ".pth":
            load_public_wan(vae, path)
        else:
            load_parameters(vae, path)
        return cls(vae, config.posterior == "sample", config.vae_tile)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, generator: np.random.Generator | None = None) -> torch.Tensor:
        """Latents of a picture (T = 1) or clip: the posterior's mean or a sample, normalised per channel.

        Args:
            pixels: [3, T, H, W] in -1..1.
            generator: the noise of a posterior sample; required when sampling, unused otherwise.

        Returns:
            [t, h, w, C] float32 on the encoder's device.

        Raises:
            ValueError: if the shape does not fit, or a sample is asked for without a generator.
        """
        check_pixels(pixels)
        posterior = self.vae.encode(pixels.to(self._weight()).unsqueeze(0)).latent_dist
        latents = posterior.mean.float()  # [1, C, t, h, w]
        if self.sample_posterior:
            if generator is None:
                raise ValueError("encoders.posterior sample: needs a generator; pass packing.rng.stream(seed, ...)")
            noise = torch.from_numpy(generator.standard_normal(latents.shape, dtype=np.float32))
            latents = latents + posterior.std.float() * noise.to(latents.device)
        mean, std = self._statistics(latents.device)
        return (latents[0].permute(1, 2, 3, 0) - mean) / std  # [C, t, h, w] -> [t, h, w, C]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [3, T, H, W], float32, clamped to -1..1, of latents [t, h, w, C].

        Raises:
            ValueError: if the shape does not fit.
        """
        check_latents(latents, self.latent_channels)
        weight = self._weight()
        mean, std = self._statistics(weight.device)
        raw = (latents.to(weight.device, torch.float32) * std + mean).permute(3, 0, 1, 2)  # -> [C, t, h, w]
        raw = raw.unsqueeze(0).to(weight)
        if self.tile and max(latents.shape[1:3]) * SPATIAL > self.tile:
            return self._decode_tiles(raw)
        pixels: torch.Tensor = self.vae.decode(raw).sample
        return pixels[0].float()

    def _decode_tiles(self, raw: torch.Tensor) -> torch.Tensor:
        """Decode [1, C, t, h, w] in tiles; where they overlap, their mean weighted by the distance from their edges."""
        side = self.tile // SPATIAL
        frames, height, width = raw.shape[2:]
        sums = torch.zeros(3, (frames - 1) * TEMPORAL + 1, height * SPATIAL, width * SPATIAL, device=raw.device)
        weights = torch.zeros(height * SPATIAL, width * SPATIAL, device=raw.device)
        for top, left in product(_tile_starts(height, side), _tile_starts(width, side)):
            part = self.vae.decode(raw[..., top : top + side, left : left + side]).sample[0].float()
            rows, columns = (
                slice(s * SPATIAL, s * SPATIAL + n) for s, n in zip((top, left), part.shape[2:], strict=True)
            )
            weight = _tile_weight(top, side, height)[:, None] * _tile_weight(left, side, width)
            weight = weight.to(raw.device)
            sums[..., rows, columns] += part * weight
            weights[rows, columns] += weight
        return sums / weights

    def _weight(self) -> torch.Tensor:
        """A parameter, for its device and dtype."""
        return next(self.vae.parameters())

    def _statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and std per channel, [C] each, float32."""
        config = self.vae.config
        return torch.tensor(config["latents_mean"], device=device), torch.tensor(config["latents_std"], device=device)


class BlockTransformCodec(torch.nn.Module):
    """A weight-free codec: the lowest frequencies of an orthonormal 3D cosine transform.

    The first frame in blocks of 16x16 pixels, the frames after it in blocks of 4x16x16, are taken through the
    orthonormal DCT-II along colour, time, height and width. (Over R, G, B the DCT is a luma-chroma rotation:
    grey, red-blue, green-magenta.) A group's coefficients are halved, which makes those of temporal frequency 0 the
    mean of its frames': in a still clip they equal the first frame's.

    Order: coefficient (n, c, y, x) (time, colour, height, width) has the frequency weight
    w = (1 + y)(1 + x)(1 + 2n)(1 + c). Groups keep the C coefficients of least w; ties go to the least n, then c, then
    y + x, then y. Those with n = 0 come first, then those with n > 0, by the same rule within each. The first frame
    keeps the C spatial coefficients of least w, so its leading channels are the groups' leading channels, and its
    last ones hold finer detail where a group holds motion. With 48 channels 39 lead.

    Scale: a coefficient is divided by colour[c] * level / ((1 + y)(1 + x)(1 + 2n)) with colour = (4, 1.5, 0.75) and
    level 4 for n = y = x = 0, else 1: a rounded fit of the standard deviations of photographs and clips in -1..1, a
    little wide where these hold less than drawn shapes do (colour, motion).

    Nothing is clamped: `encode(decode(z))` is z to float32 rounding.
    """

    COLOUR_SCALE = (4.0, 1.5, 0.75)
    MEAN_LEVEL = 4.0

    frame_basis: torch.Tensor  # [C, 3*16*16] orthonormal rows
    group_basis: torch.Tensor  # [C, 3*4*16*16] orthonormal rows
    frame_scale: torch.Tensor  # [C]
    group_scale: torch.Tensor  # [C], the halving included

    def __init__(self, latent_channels: int):
        """Build the bases for `latent_channels` (1 to 768) channels.

        Raises:
            EncoderError: if the first frame has fewer coefficients than that, or the number is not positive.
        """
        super().__init__()
        available = 3 * SPATIAL**2
        if not 1 <= latent_channels <= available:
            raise EncoderError(
                f"model.latent_channels {latent_channels}: block_transform keeps 1 to {available}, the coefficients of "
                "a first-frame block; choose fewer"
            )
        self.latent_channels = latent_channels
        frame = self._lowest(1, latent_channels)
        group = sorted(self._lowest(TEMPORAL, latent_channels), key=lambda index: index[0] > 0)  # stable
        self._register("frame", frame, 1)
        self._register("group", group, TEMPORAL)

    def encode(self, pixels: torch.Tensor, generator: np.random.Generator | None = None) -> torch.Tensor:
        """Latents [t, h, w, C], float32, of pixels [3, T, H, W] in -1..1; `generator` is not read.

        Raises:
            ValueError: if the shape does not fit.
        """
        check_pixels(pixels)
        pixels = pixels.to(self.frame_basis)
        first = _to_blocks(pixels[:, :1], 1) @ self.frame_basis.T / self.frame_scale
        groups = _to_blocks(pixels[:, 1:], TEMPORAL) @ self.group_basis.T / self.group_scale
        return torch.cat([first, groups])

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels [3, T, H, W], float32, not clamped, of latents [t, h, w, C].

        Raises:
            ValueError: if the shape does not fit.
        """
        check_latents(latents, self.latent_channels)
        latents = latents.to(self.frame_basis)
        first = _from_blocks(latents[:1] * self.frame_scale @ self.frame_basis, 1)
        groups = _from_blocks(latents[1:] * self.group_scale @ self.group_basis, TEMPORAL)
        return torch.cat([first, groups], dim=1)

    @staticmethod
    def _lowest(frames: int, count: int) -> list[tuple[int, int, int, int]]:
        """The `count` indices (n, c, y, x) of least frequency weight, in order."""

        def rank(index: tuple[int, int, int, int]) -> tuple[int, ...]:
            n, c, y, x = index
            return (1 + y) * (1 + x) * (1 + 2 * n) * (1 + c), n, c, y + x, y

        return sorted(product(range(frames), range(3), range(SPATIAL), range(SPATIAL)), key=rank)[:count]

    def _register(self, name: str, indices: list[tuple[int, int, int, int]], frames: int) -> None:
        """Basis rows and scales of the chosen coefficients, as buffers."""
        time, colour, space = (dct(np.eye(size), norm="ortho", axis=0) for size in (frames, 3, SPATIAL))
        n, c, y, x = np.array(indices).T
        basis = np.einsum("kc,kn,ky,kx->kcnyx", colour[c], time[n], space[y], space[x]).reshape(len(indices), -1)
        level = np.where(n + y + x == 0, self.MEAN_LEVEL, 1.0)
        scale = np.array(self.COLOUR_SCALE)[c] * level / ((1 + y) * (1 + x) * (1 + 2 * n)) * frames**0.5
        self.register_buffer(f"{name}_basis", torch.from_numpy(basis).float(), persistent=False)
        self.register_buffer(f"{name}_scale", torch.from_numpy(scale).float(), persistent=False)


def check_pixels(pixels: torch.Tensor) -> None:
    """Raise a ValueError unless `pixels` is floating [3, 4k+1, 16h, 16w]."""
    shape = tuple(pixels.shape)
    if pixels.dim() != 4 or shape[0] != 3 or not pixels.is_floating_point():
        raise ValueError(f"VAE input of shape {shape}, {pixels.dtype}: must be floating [3, T, H, W]")
    if shape[1] % TEMPORAL != 1:
        raise ValueError(f"VAE input of {shape[1]} frames: must be 4k+1; sample the frames so (spec/data.md section 3)")
    if min(shape[2:]) < SPATIAL or shape[2] % SPATIAL or shape[3] % SPATIAL:
        raise ValueError(
            f"VAE input of {shape[2]}x{shape[3]} pixels: height and width must be multiples of {SPATIAL}; resize to a "
            "VAE bucket first"
        )


def check_latents(latents: torch.Tensor, channels: int) -> None:
    """Raise a ValueError unless `latents` is [t, h, w, channels] with no empty axis."""
    shape = tuple(latents.shape)
    if latents.dim() != 4 or shape[3] != channels or min(shape) < 1:
        raise ValueError(f"VAE latents of shape {shape}: must be [t, h, w, {channels}], none of them 0")


def _tile_starts(length: int, side: int) -> list[int]:
    """First cells of tiles of `side` cells that cover `length` cells and overlap by a quarter or more."""
    last = max(length - side, 0)
    return [*range(0, last, side * 3 // 4), last]


def _tile_weight(start: int, side: int, length: int) -> torch.Tensor:
    """Weight of each pixel of a tile along one axis, rising over a quarter of it from edges inside the frame."""
    pixels, ramp = min(side, length) * SPATIAL, side * SPATIAL // 4
    place = torch.arange(pixels) + 0.5
    rising = place / ramp if start > 0 else torch.ones(pixels)
    falling = (pixels - place) / ramp if start + side < length else torch.ones(pixels)
    return torch.minimum(rising, falling).clamp(max=1.0)


def _to_blocks(pixels: torch.Tensor, frames: int) -> torch.Tensor:
    """[3, t*frames, 16h, 16w] -> [t, h, w, 3*frames*16*16]."""
    return rearrange(pixels, "c (t n) (h y) (w x) -> t h w (c n y x)", n=frames, y=SPATIAL, x=SPATIAL)


def _from_blocks(blocks: torch.Tensor, frames: int) -> torch.Tensor:
    """[t, h, w, 3*frames*16*16] -> [3, t*frames, 16h, 16w]."""
    return rearrange(blocks, "t h w (c n y x) -> c (t n) (h y) (w x)", c=3, n=frames, y=SPATIAL, x=SPATIAL)


def _small_wan(latent_channels: int) -> dict[str, Any]:
    """Wan2.2's architecture with tiny widths; the published statistics belong to 48 channels only."""
    settings = {**WAN22_CONFIG, **SMALL_WAN_DIMS, "z_dim": latent_channels}
    if latent_channels != WAN22_CONFIG["z_dim"]:
        settings.update(latents_mean=[0.0] * latent_channels, latents_std=[1.0] * latent_channels)
    return settings


def _read_wan(path: Path, latent_channels: int) -> dict[str, Any]:
    """The settings in a diffusers folder or of the public file, checked against what the model expects."""
    public = path.suffix == ".pth"
    content = WAN22_CONFIG if public else read_json(path, "config.json")
    content = {key: value for key, value in content.items() if not key.startswith("_")}
    expected = {"z_dim": latent_channels, "scale_factor_spatial": SPATIAL, "scale_factor_temporal": TEMPORAL}
    found = {key: content.get(key) for key in expected}
    for key in ("latents_mean", "latents_std"):
        expected[f"length of {key}"], found[f"length of {key}"] = latent_channels, len(content.get(key, ()))
    wrong = [f"{key} {found[key]}, expected {value}" for key, value in expected.items() if found[key] != value]
    if wrong:
        where = path if public else path / "config.json"
        raise EncoderError(f"{where}: {'; '.join(wrong)}: use a Wan2.2 VAE with model.latent_channels")
    return content
