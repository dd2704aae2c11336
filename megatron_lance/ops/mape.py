"""Rotary rotation by MaPE positions (spec/model.md section 4).

Station: QKV projection and QK-norm -> [rotation] -> joint attention.  In: q or k of some rows and the rows' angles.
Out: the rotated q or k.  Angles come from integer positions that already carry MaPE, so this op knows no modality.

Shapes: r rows, n heads, d head channels, d/2 frequencies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SUPPORTED_INV_FREQ = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def inverse_frequencies(head_dim: int, base: float, dtype: str) -> torch.Tensor:
    """Rotary frequencies theta^(-2j/d).

    Args:
        head_dim: channels per head, d.
        base: theta.
        dtype: "float32", or "bfloat16" for the rounded values that the released weights were trained with.

    Returns:
        float32 [d/2]; rounded through bfloat16 if asked for.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (base**exponents)
    return frequencies.to(SUPPORTED_INV_FREQ[dtype]).to(torch.float32)


def rotary_angles(
    positions: torch.Tensor, inv_freq: torch.Tensor, sections: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every row and frequency; each frequency follows the axis of its section.

    Args:
        positions: int [3, r], temporal, height, width.
        inv_freq: float32 [d/2].
        sections: frequencies per axis (temporal, height, width); they sum to d/2.

    Returns:
        (cos, sin), float32 [r, d/2].
    """
    by_axis = zip(positions.to(torch.float32), inv_freq.split(list(sections)), strict=True)
    angles = torch.cat([torch.outer(position, frequencies) for position, frequencies in by_axis], dim=1)  # [r, d/2]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of every head against one another (rotate-half), in float32.

    Args:
        x: [r, n, d].
        cos: float32 [r, d/2].
        sin: float32 [r, d/2].

    Returns:
        [r, n, d] in x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
