"""The frozen Qwen2.5-VL vision encoder (spec/model.md section 1, spec/data.md section 3).

Station: decode -> [ViT] -> embedder.  In: pictures and clips as normalised pixels.  Out: one feature row per 2x2 block
of patches, as wide as the model, which the embedder uses as it is.

Shapes: T frames, H x W pixels, t = ceil(T / 2), h = H / 14, w = W / 14 patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from megatron_lance.config.schema import EncoderConfig
from megatron_lance.encoders.weights import EncoderError, construct, draw_parameters, load_parameters, read_json

PREFIXES = ("visual.", "model.visual.", "vit_model.")
"""Where whole-model checkpoints keep the ViT; a bare ViT has none."""


def patchify(pixels: torch.Tensor, patch: int, temporal_patch: int, merge: int) -> torch.Tensor:
    """Cut a clip into patch vectors in the order Qwen2.5-VL expects (spec/data.md section 3).

    A clip whose length is no multiple of `temporal_patch` repeats its last frame; so a picture is doubled.

    Args:
        pixels: [3, T, H, W]; H and W multiples of patch * merge.
        patch: pixels along height and along width of a patch.
        temporal_patch: frames of a patch.
        merge: patches along each side of a merge block.

    Returns:
        [t*h*w, 3*temporal_patch*patch*patch]: rows by time, merge block row-major, patch inside the block; columns by
        channel, frame, y, x.
    """
    missing = -pixels.shape[1] % temporal_patch
    clip = torch.cat([pixels, pixels[:, -1:].expand(-1, missing, -1, -1)], dim=1)
    return rearrange(
        clip,
        "c (t n) (h a y) (w b x) -> (t h w a b) (c n y x)",
        n=temporal_patch,
        a=merge,
        b=merge,
        y=patch,
        x=patch,
    )


class VitEncoder(torch.nn.Module):
    """transformers' Qwen2.5-VL vision model, frozen, for clips of any size."""

    def __init__(self, vision: Qwen2_5_VisionTransformerPretrainedModel):
        super().__init__()
        config = vision.config
        if not isinstance(config.patch_size, int) or not isinstance(config.temporal_patch_size, int):
            raise EncoderError(
                f"ViT patch_size {config.patch_size}, temporal_patch_size {config.temporal_patch_size}: must be "
                "integers; square patches only"
            )
        self.vision = vision
        self.patch = config.patch_size  # pixels
        self.temporal_patch = config.temporal_patch_size  # frames
        self.merge = config.spatial_merge_size  # patches
        self.width = int(config.out_hidden_size)  # channels of the output

    @classmethod
    def build(cls, config: EncoderConfig, hidden_size: int, seed: int) -> VitEncoder:
        """The encoder from `config.vit_path`, or a small random one where that is empty.

        Args:
            config: paths, sizes of the small model, dtype.
            hidden_size: channels of the language model; the encoder's output width.
            seed: names the random weights; unused with a path.

        Raises:
            EncoderError: if the folder lacks config.json or weights, or widths, heads or weights do not fit.
        """
        folder = Path(config.vit_path) if config.vit_path else None
        vision_config = _small_config(config, hidden_size) if folder is None else _read_config(folder)
        if vision_config.out_hidden_size != hidden_size:
            raise EncoderError(
                f"ViT out_hidden_size {vision_config.out_hidden_size} ({folder}): must equal model.hidden_size "
                f"{hidden_size}, for its output enters the model as it is; use the ViT made for this size"
            )
        vision = construct(lambda: Qwen2_5_VisionTransformerPretrainedModel(vision_config), config.dtype)
        if folder is None:
            draw_parameters(vision, seed, "vit_model")
        else:
            load_parameters(vision, folder, PREFIXES)
        return cls(vision)

    @torch.no_grad()
    def encode(self, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Features of pictures and clips; each is independent of the others in the call.

        Args:
            pixels: per clip [3, T, H, W], floating, normalised with CLIP's mean and std; T = 1 for a picture; H and W
                multiples of 28.

        Returns:
            Per clip [t * H/28 * W/28, hidden] in the encoder's dtype and on its device, rows by (t, row, column).

        Raises:
            ValueError: if a clip has another shape.
        """
        if not pixels:
            return []
        for number, clip in enumerate(pixels):
            _check_clip(number, clip, self.patch * self.merge)
        weight = self.vision.patch_embed.proj.weight
        patches = [patchify(clip.to(weight), self.patch, self.temporal_patch, self.merge) for clip in pixels]
        grids = [
            (math.ceil(clip.shape[1] / self.temporal_patch), clip.shape[2] // self.patch, clip.shape[3] // self.patch)
            for clip in pixels
        ]
        grid_thw = torch.tensor(grids, dtype=torch.int64, device=weight.device)
        features = self.vision(torch.cat(patches), grid_thw=grid_thw).pooler_output
        return list(features.split([t * h * w // self.merge**2 for t, h, w in grids]))


def _check_clip(number: int, clip: torch.Tensor, multiple: int) -> None:
    shape = tuple(clip.shape)
    if clip.dim() != 4 or shape[0] != 3 or shape[1] < 1 or not clip.is_floating_point():
        raise ValueError(f"ViT clip {number} of shape {shape}, {clip.dtype}: must be floating [3, T, H, W] with T >= 1")
    if min(shape[2:]) < multiple or shape[2] % multiple or shape[3] % multiple:
        raise ValueError(
            f"ViT clip {number} of {shape[2]}x{shape[3]} pixels: height and width must be multiples of {multiple}; "
            "resize to a ViT bucket first"
        )


def _small_config(config: EncoderConfig, hidden_size: int) -> Qwen2_5_VLVisionConfig:
    """A small ViT: windowed attention in all blocks but the last, which sees the whole frame."""
    if config.small_vit_hidden % (4 * config.small_vit_heads):
        raise EncoderError(
            f"encoders.small_vit_hidden {config.small_vit_hidden}: must be a multiple of 4 * small_vit_heads "
            f"({4 * config.small_vit_heads}), for rotary angles of height and width; change one of them"
        )
    return Qwen2_5_VLVisionConfig(
        depth=config.small_vit_depth,
        hidden_size=config.small_vit_hidden,
        intermediate_size=2 * config.small_vit_hidden,
        num_heads=config.small_vit_heads,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=hidden_size,
        fullatt_block_indexes=[config.small_vit_depth - 1],
    )


def _read_config(folder: Path) -> Qwen2_5_VLVisionConfig:
    """The vision part of config.json: a ViT's own, or that of a whole Qwen2.5-VL."""
    content = read_json(folder, "config.json")
    return Qwen2_5_VLVisionConfig.from_dict(content.get("vision_config", content))
