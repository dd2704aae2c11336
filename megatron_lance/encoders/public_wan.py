"""The public file of Wan2.2's VAE for diffusers' AutoencoderKLWan.

Station: start of a run, under encoders/vae.py.  The public file names a module's children by their place in a
sequence; diffusers names them by what they are.  diffusers' own mapping knows the blocks of Wan2.1 only, where a level
has no shortcut of its own and its blocks stand in one flat sequence.

    public                                          diffusers
    conv1, conv2                                    quant_conv, post_quant_conv
    encoder.conv1, encoder.head.{0,2}               encoder.conv_in, encoder.{norm_out,conv_out}
    encoder.middle.{0,1,2}                          encoder.mid_block.{resnets.0,attentions.0,resnets.1}
    encoder.downsamples.I.downsamples.J             encoder.down_blocks.I.resnets.J, or its downsampler behind them
    decoder.upsamples.I.upsamples.J                 decoder.up_blocks.I.resnets.J, or its upsampler behind them
    residual.{0,2,3,6}, shortcut                    {norm1,conv1,norm2,conv2}, conv_shortcut
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch

from megatron_lance.encoders.weights import EncoderError, check_parameters

_SIDES = r"(encoder|decoder)"
_LEVEL = r"(?:encoder\.downsamples|decoder\.upsamples)\.(\d+)\.(?:downsamples|upsamples)"
_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
_PLAIN = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{f"{side}.conv1": f"{side}.conv_in" for side in ("encoder", "decoder")},
    **{f"{side}.head.0": f"{side}.norm_out" for side in ("encoder", "decoder")},
    **{f"{side}.head.2": f"{side}.conv_out" for side in ("encoder", "decoder")},
}


def diffusers_name(public: str) -> str | None:
    """Name in diffusers of a parameter of the public file; None if there is none."""
    module, _, leaf = public.rpartition(".")
    renamed = _PLAIN.get(module) or _middle(module) or _level(module)
    return None if renamed is None else f"{renamed}.{leaf}"


def _middle(module: str) -> str | None:
    """Residual, attention, residual between the two halves."""
    match = re.fullmatch(rf"{_SIDES}\.middle\.([012])\.(.+)", module)
    if match is None:
        return None
    side, place, inner = match.groups()
    if place == "1":
        return f"{side}.mid_block.attentions.0.{inner}" if inner in ("norm", "to_qkv", "proj") else None
    renamed = _residual(inner)
    return None if renamed is None else f"{side}.mid_block.resnets.{int(place) // 2}.{renamed}"


def _level(module: str) -> str | None:
    """The residual blocks of a level, and the resampling behind them."""
    match = re.fullmatch(rf"{_LEVEL}\.(\d+)\.(.+)", module)
    if match is None:
        return None
    level, place, inner = match.groups()
    down = module.startswith("encoder")
    block = f"encoder.down_blocks.{level}" if down else f"decoder.up_blocks.{level}"
    if inner in ("resample.1", "time_conv"):
        return f"{block}.{'downsampler' if down else 'upsampler'}.{inner}"
    renamed = _residual(inner)
    return None if renamed is None else f"{block}.resnets.{place}.{renamed}"


def _residual(inner: str) -> str | None:
    """A part of a residual block."""
    if inner == "shortcut":
        return "conv_shortcut"
    match = re.fullmatch(r"residual\.(\d+)", inner)
    return None if match is None else _RESIDUAL.get(match[1])


@torch.no_grad()
def load_public_wan(module: torch.nn.Module, path: Path) -> None:
    """Copy the public file's weights into diffusers' AutoencoderKLWan, all of them and nothing else.

    Args:
        module: its parameters are overwritten and keep their dtype.
        path: of Wan2.2_VAE.pth; only tensors are read from it, never code.

    Raises:
        EncoderError: if the file is missing or unreadable; or naming missing, unknown and misshapen tensors at once.
    """
    if not path.is_file():
        raise EncoderError(f"{path}: not found; correct encoders.vae_path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise EncoderError(f"{path}: is not a readable file of tensors ({error}); copy it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise EncoderError(f"{path}: holds more than named tensors; give the public Wan2.2_VAE.pth")
    by_name = {diffusers_name(key) or key: tensor for key, tensor in state.items()}
    check_parameters(module, {name: tuple(tensor.shape) for name, tensor in by_name.items()}, path)
    for name, parameter in module.named_parameters():
        parameter.copy_(by_name[name])
