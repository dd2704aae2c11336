"""Names and shapes of the frozen Qwen2.5-VL ViT (spec/model.md section 1).

Station: under import and export, which pass a ViT on without running it.  A public folder need not say how large its
ViT is, so the sizes are read off the tensors; a tensor that does not fit the others is found by its name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from megatron_lance.checkpoint.public_files import Shape, check_names

PATCHES = "patch_embed.proj.weight"
_BLOCK = re.compile(r"blocks\.(\d{1,3})\.(.+)")


def vit_shapes(vision: Qwen2_5_VLVisionConfig) -> dict[str, Shape]:
    """Every parameter of a ViT."""
    with torch.device("meta"):
        module = Qwen2_5_VisionTransformerPretrainedModel(vision)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def expected_shapes(found: Mapping[str, Shape], hidden_size: int) -> dict[str, Shape]:
    """Every parameter of the ViT that these tensors are meant to be.

    Args:
        found: shapes by the names of a bare ViT.
        hidden_size: channels of the language model, which are the ViT's output.
    """
    blocks = [(int(match[1]), match[2], shape) for key, shape in found.items() if (match := _BLOCK.fullmatch(key))]
    width = _usual((shape for _, name, shape in blocks if name in ("norm1.weight", "norm2.weight")), 1280)
    ffn = _usual((shape for _, name, shape in blocks if name == "mlp.gate_proj.weight"), 3420)
    patches = found.get(PATCHES, ())
    channels, time, patch = (patches[1], patches[2], patches[3]) if len(patches) == 5 and all(patches) else (3, 2, 14)
    merged = (found.get("merger.mlp.0.weight") or (4 * width,))[-1]
    vision = Qwen2_5_VLVisionConfig(
        depth=1 + max((block for block, _, _ in blocks), default=31),
        hidden_size=width,
        intermediate_size=ffn,
        num_heads=1,  # no shape depends on it
        in_channels=channels,
        temporal_patch_size=time,
        patch_size=patch,
        spatial_merge_size=max(math.isqrt(merged // width), 1),
        out_hidden_size=hidden_size,
    )
    return vit_shapes(vision)


def _usual(shapes: Iterator[Shape], default: int) -> int:
    """The first side that most tensors have."""
    counts = Counter(shape[0] for shape in shapes if shape and shape[0])
    return counts.most_common(1)[0][0] if counts else default


def check_vit(found: Mapping[str, Shape], hidden_size: int, where: str) -> None:
    """Hold tensors against the ViT they are meant to be.

    Args:
        found: shapes by the names of a bare ViT.
        hidden_size: channels of the language model.
        where: what an error calls them.

    Raises:
        CheckpointError: naming missing, unknown and misshapen tensors together.
    """
    check_names(expected_shapes(found, hidden_size), found, where)
