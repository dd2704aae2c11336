"""Encode one media item, and say what encodes.

Station: reading -> [one item's pixels -> its encoding] -> replica, encoding cache.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch

from megatron_lance.config.schema import EncoderConfig
from megatron_lance.encoders.vae import VideoAutoencoder, WanAutoencoder
from megatron_lance.encoders.vit import VitEncoder

_VERSIONS = ("transformers_version", "_name_or_path")
_STATISTICS = ("latents_mean", "latents_std")


@dataclass(frozen=True)
class ItemEncoders:
    """The frozen encoders of one rank.

    Attributes:
        vit: for items of encoder "vit".
        vae: for items of encoder "vae".
    """

    vit: VitEncoder
    vae: VideoAutoencoder

    def encode(self, encoder: str, pixels: torch.Tensor, generator: np.random.Generator | None) -> torch.Tensor:
        """The encoding of an item by itself.

        Args:
            encoder: vit | vae.
            pixels: [3, T, H, W], normalised for it.
            generator: noise of a posterior that is sampled.

        Returns:
            [rows, width] on the encoder's device: ViT features in the encoder's dtype, latents in float32.
        """
        if encoder == "vit":
            return self.vit.encode([pixels])[0]
        latents = self.vae.encode(pixels, generator)
        return latents.reshape(-1, latents.shape[-1])

    def identity(self, config: EncoderConfig, decode: str) -> dict[str, str]:
        """What decides the bits of an encoding, beside the pixels: weights, settings, dtype, kind of device, decoder.

        Args:
            config: the encoders section.
            decode: host | mixed.
        """
        vit = self.vit
        settings = {k: v for k, v in vit.vision.config.to_dict().items() if k not in _VERSIONS}
        return {
            "vit": _digest(vit, settings),
            "vae": f"{config.vae} {_vae_digest(self.vae)}",
            "encoders.dtype": config.dtype,
            "device": vit.vision.patch_embed.proj.weight.device.type,
            "data.decode": decode,
        }


def _vae_digest(vae: object) -> str:
    assert isinstance(vae, torch.nn.Module)
    statistics = {name: vae.vae.config[name] for name in _STATISTICS} if isinstance(vae, WanAutoencoder) else {}
    return _digest(vae, statistics)


def _digest(module: torch.nn.Module, settings: object) -> str:
    """Hash of settings, parameters and buffers, 16 hex digits."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]
