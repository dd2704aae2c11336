"""One rectangle of attention by torch's scaled dot product attention.

Station: used by the backends of ops/attention.py that loop over rectangles.  In: queries of one slice and the keys and
values it sees.  Out: attended values.

Shapes: n_q queries, n_k keys, hq query heads, hkv key/value heads, d channels per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention.bias import causal_lower_right


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False
) -> torch.Tensor:
    """Q [n_q, hq, d], k and v [n_k, hkv, d], mask bool [n_q, n_k] or None -> [n_q, hq, d].

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: which pairs are allowed; a row that allows none gives zeros.
        causal: query i sees the first i + 1 keys; without a mask.
    """
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def attend_slice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """All pairs, or bottom-right aligned causal: query i sees the first n_k - n_q + i + 1 keys.

    Args:
        q: [n_q, hq, d].
        k: [n_k, hkv, d].
        v: [n_k, hkv, d].
        causal: which of the two.

    Returns:
        [n_q, hq, d].
    """
    n_q, n_k = q.shape[0], k.shape[0]
    if not causal or n_q == n_k:
        return attend(q, k, v, causal=causal)
    return attend(q, k, v, _lower_right(n_q, n_k, q.device))


def _lower_right(n_q: int, n_k: int, device: torch.device) -> torch.Tensor:
    """The bottom-right aligned causal mask: one that CUDA kernels know by name, else as bool [n_q, n_k]."""
    if device.type == "cuda":
        return causal_lower_right(n_q, n_k)
    return torch.ones(n_q, n_k, dtype=torch.bool, device=device).tril(n_k - n_q)
