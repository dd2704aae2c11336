"""The names of the released vit.safetensors, at any size: the released ones or tiny ones."""

from __future__ import annotations

Shape = tuple[int, ...]


def released_vit(depth: int = 32, width: int = 1280, ffn: int = 3420, out: int = 2048) -> dict[str, Shape]:
    """Shape of every tensor of the file, by its bare name.

    Args:
        depth: blocks.
        width: channels.
        ffn: channels of the blocks' feed-forward layers.
        out: channels of the output.
    """
    shapes: dict[str, Shape] = {"patch_embed.proj.weight": (width, 3, 2, 14, 14), "merger.ln_q.weight": (width,)}
    for name, shape in (("0", (4 * width, 4 * width)), ("2", (out, 4 * width))):
        shapes |= {f"merger.mlp.{name}.weight": shape, f"merger.mlp.{name}.bias": shape[:1]}
    for block in range(depth):
        shapes |= {f"blocks.{block}.norm{i}.weight": (width,) for i in (1, 2)}
        linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.down_proj": (width, ffn)}
        linears |= {"mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width)}
        for name, shape in linears.items():
            shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
    return shapes
