"""Random values of a pack, for checks and benchmarks that need no data.

Station: pack -> [token ids, encodings, noise] -> dispatch.  A pack and a seed always give the same values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lance.objectives.flow_matching import draw_noise
from megatron_lance.packing.batch import PackNoise, PackTokens, PackVisuals
from megatron_lance.packing.rng import stream
from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import VAE_KINDS, SegmentKind


@dataclass(frozen=True)
class FilledPack:
    """A pack and its values.

    Attributes:
        pack: the structure.
        tokens: ids and labels.
        visuals: encodings; every visual segment valid.
        noise: timesteps and noise.
    """

    pack: Pack
    tokens: PackTokens
    visuals: PackVisuals
    noise: PackNoise

    @classmethod
    def random(cls, pack: Pack, *, hidden: int, channels: int, vocabulary: int, seed: int) -> FilledPack:
        """Uniform ids, normal encodings, noise as a run draws it.

        Args:
            pack: the structure; its first sample id is part of the address.
            hidden: width of ViT rows.
            channels: of latents.
            vocabulary: ids lie below it.
            seed: of all draws.
        """
        name = pack.samples[0].sample_id

        def normal(kind: str, rows: int, width: int) -> torch.Tensor:
            return torch.from_numpy(stream(seed, kind, name).standard_normal((rows, width), dtype="float32"))

        ids = stream(seed, "token ids", name).integers(0, vocabulary, pack.length)
        n_vit = sum(p.segment.content_length for p in pack.visual_segments(SegmentKind.VIT))
        n_vae = sum(p.segment.content_length for p in pack.visual_segments(*VAE_KINDS))
        visuals = PackVisuals(
            vit=normal("vit", n_vit, hidden),
            latents=normal("latents", n_vae, channels),
            valid=torch.ones(sum(1 for p in pack.placed_segments() if p.segment.is_visual), dtype=torch.bool),
        )
        epochs = (0,) * len(pack.samples)
        noise = draw_noise(pack, epochs, channels, seed=seed, shift=2.0, distribution="logit_normal")
        return cls(pack, PackTokens.from_ids(pack, torch.from_numpy(ids)), visuals, noise)
