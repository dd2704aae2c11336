"""The public Wan2.2_VAE.pth in diffusers' module: every name, every shape, refusals."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from megatron_lance.config.schema import EncoderConfig
from megatron_lance.encoders import vae as vae_module
from megatron_lance.encoders.public_wan import diffusers_name
from megatron_lance.encoders.vae import SMALL_WAN_DIMS, WAN22_CONFIG, WanAutoencoder
from megatron_lance.encoders.weights import EncoderError

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, inputs: int, outputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def residual(name: str, inputs: int, outputs: int) -> Shapes:
    """Norm, conv, norm, conv; a shortcut where the width changes."""
    shapes: Shapes = {f"{name}.residual.0.gamma": (inputs, 1, 1, 1), f"{name}.residual.3.gamma": (outputs, 1, 1, 1)}
    shapes |= conv(f"{name}.residual.2", inputs, outputs, 3, 3, 3) | conv(
        f"{name}.residual.6", outputs, outputs, 3, 3, 3
    )
    return shapes | (conv(f"{name}.shortcut", inputs, outputs, 1, 1, 1) if inputs != outputs else {})


def middle(name: str, width: int) -> Shapes:
    attention = {f"{name}.1.norm.gamma": (width, 1, 1)} | conv(f"{name}.1.to_qkv", width, 3 * width, 1, 1)
    attention |= conv(f"{name}.1.proj", width, width, 1, 1)
    return residual(f"{name}.0", width, width) | attention | residual(f"{name}.2", width, width)


def public_shapes(base: int, decoder_base: int, blocks: int, latent: int) -> Shapes:
    """The file's tensors, written down from the public model: four levels, of which the second and third halve time."""
    shapes = conv("conv1", 2 * latent, 2 * latent, 1, 1, 1) | conv("conv2", latent, latent, 1, 1, 1)
    widths = [base * m for m in (1, 1, 2, 4, 4)]
    shapes |= conv("encoder.conv1", 12, base, 3, 3, 3)
    for level, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        name = f"encoder.downsamples.{level}.downsamples"
        for block in range(blocks):
            shapes |= residual(f"{name}.{block}", inputs if block == 0 else outputs, outputs)
        if level < 3:
            shapes |= conv(f"{name}.{blocks}.resample.1", outputs, outputs, 3, 3)
        if level in (1, 2):
            shapes |= conv(f"{name}.{blocks}.time_conv", outputs, outputs, 3, 1, 1)
    shapes |= middle("encoder.middle", widths[-1]) | {"encoder.head.0.gamma": (widths[-1], 1, 1, 1)}
    shapes |= conv("encoder.head.2", widths[-1], 2 * latent, 3, 3, 3)
    widths = [decoder_base * m for m in (4, 4, 4, 2, 1)]
    shapes |= conv("decoder.conv1", latent, widths[0], 3, 3, 3) | middle("decoder.middle", widths[0])
    for level, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        name = f"decoder.upsamples.{level}.upsamples"
        for block in range(blocks + 1):
            shapes |= residual(f"{name}.{block}", inputs if block == 0 else outputs, outputs)
        if level < 3:
            shapes |= conv(f"{name}.{blocks + 1}.resample.1", outputs, outputs, 3, 3)
        if level in (0, 1):
            shapes |= conv(f"{name}.{blocks + 1}.time_conv", outputs, 2 * outputs, 3, 1, 1)
    return shapes | {"decoder.head.0.gamma": (widths[-1], 1, 1, 1)} | conv("decoder.head.2", widths[-1], 12, 3, 3, 3)


def write_public(path: Path, shapes: Shapes) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    tensors = {key: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for key, shape in shapes.items()}
    torch.save(tensors, path)
    return tensors


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Shapes:
    """A narrow Wan2.2: the published configuration with other widths, and the shapes of its public file."""
    monkeypatch.setattr(vae_module, "WAN22_CONFIG", {**WAN22_CONFIG, **SMALL_WAN_DIMS})
    return public_shapes(SMALL_WAN_DIMS["base_dim"], SMALL_WAN_DIMS["decoder_base_dim"], 1, 48)


def test_names_and_shapes_of_the_released_file_are_diffusers() -> None:
    with torch.device("meta"):
        module = AutoencoderKLWan(**WAN22_CONFIG)
    want = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    found = {diffusers_name(key): shape for key, shape in public_shapes(160, 256, 2, 48).items()}
    assert found == want and len(found) == len(public_shapes(160, 256, 2, 48))


def test_each_tensor_goes_where_it_belongs(small: Shapes, tmp_path: Path) -> None:
    tensors = write_public(tmp_path / "Wan2.2_VAE.pth", small)
    config = EncoderConfig(vae="wan", vae_path=str(tmp_path / "Wan2.2_VAE.pth"))
    vae = WanAutoencoder.build(config, 48, seed=0)
    state = vae.vae.state_dict()
    for public, name in {
        "conv1.weight": "quant_conv.weight",
        "conv2.bias": "post_quant_conv.bias",
        "encoder.conv1.weight": "encoder.conv_in.weight",
        "encoder.downsamples.1.downsamples.0.residual.0.gamma": "encoder.down_blocks.1.resnets.0.norm1.gamma",
        "encoder.downsamples.1.downsamples.0.residual.2.weight": "encoder.down_blocks.1.resnets.0.conv1.weight",
        "encoder.downsamples.1.downsamples.0.residual.3.gamma": "encoder.down_blocks.1.resnets.0.norm2.gamma",
        "encoder.downsamples.1.downsamples.0.residual.6.bias": "encoder.down_blocks.1.resnets.0.conv2.bias",
        "encoder.downsamples.1.downsamples.0.shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.downsamples.1.downsamples.1.time_conv.weight": "encoder.down_blocks.1.downsampler.time_conv.weight",
        "encoder.middle.0.residual.2.weight": "encoder.mid_block.resnets.0.conv1.weight",
        "encoder.middle.1.to_qkv.weight": "encoder.mid_block.attentions.0.to_qkv.weight",
        "encoder.middle.2.residual.2.weight": "encoder.mid_block.resnets.1.conv1.weight",
        "encoder.head.2.weight": "encoder.conv_out.weight",
        "decoder.upsamples.0.upsamples.1.residual.2.weight": "decoder.up_blocks.0.resnets.1.conv1.weight",
        "decoder.upsamples.0.upsamples.2.resample.1.weight": "decoder.up_blocks.0.upsampler.resample.1.weight",
        "decoder.head.0.gamma": "decoder.norm_out.gamma",
    }.items():
        assert torch.equal(state[name], tensors[public]), public
    assert len({state[name].sum().item() for name in state}) == len(tensors)  # every tensor once
    pixels = torch.zeros(3, 5, 32, 32)
    assert torch.isfinite(vae.encode(pixels)).all() and vae.encode(pixels).shape == (2, 2, 2, 48)


def test_all_problems_are_listed_together(small: Shapes, tmp_path: Path) -> None:
    path = tmp_path / "Wan2.2_VAE.pth"
    del small["encoder.conv1.bias"]
    small |= {"encoder.downsamples.0.downsamples.0.residual.9.weight": (2,), "conv2.bias": (7,)}
    write_public(path, small)
    config = EncoderConfig(vae="wan", vae_path=str(path))
    with pytest.raises(EncoderError) as caught:
        WanAutoencoder.build(config, 48, seed=0)
    for part in (
        "encoder.conv_in.bias: missing",
        "encoder.downsamples.0.downsamples.0.residual.9.weight: unknown",
        "post_quant_conv.bias: shape (7,), expected (48,)",
    ):
        assert part in str(caught.value)
    with pytest.raises(EncoderError, match="z_dim 48, expected 16"):
        WanAutoencoder.build(config, 16, seed=0)


class Code:
    """Something that runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


@pytest.mark.parametrize("content", ["code", "text", "list"])
def test_a_file_of_anything_else_is_refused(
    small: Shapes, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "Wan2.2_VAE.pth"
    config = EncoderConfig(vae="wan", vae_path=str(path))
    with pytest.raises(EncoderError, match=r"Wan2.2_VAE.pth: not found; correct encoders.vae_path"):
        WanAutoencoder.build(config, 48, seed=0)
    {
        "code": lambda: path.write_bytes(pickle.dumps({"conv1.weight": Code()})),
        "text": lambda: path.write_text("no tensors"),
        "list": lambda: torch.save([torch.zeros(1)], path),
    }[content]()
    with pytest.raises(EncoderError, match="is not a readable file of tensors|holds more than named tensors"):
        WanAutoencoder.build(config, 48, seed=0)
    assert "ran" not in capsys.readouterr().out


def test_bfloat16(small: Shapes, tmp_path: Path) -> None:
    write_public(tmp_path / "x.pth", small)
    config = EncoderConfig(vae="wan", vae_path=str(tmp_path / "x.pth"))
    vae = WanAutoencoder.build(dataclasses.replace(config, dtype="bfloat16"), 48, seed=0)
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}
