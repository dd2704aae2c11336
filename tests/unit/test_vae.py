"""The frozen autoencoders: shapes, determinism, causality, and what the weight-free codec keeps."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from PIL import Image

from megatron_lance.config.schema import EncoderConfig
from megatron_lance.encoders.vae import WAN22_CONFIG, BlockTransformCodec, WanAutoencoder, build_vae
from megatron_lance.encoders.weights import EncoderError
from megatron_lance.packing.rng import stream
from tests.shared import shared_path

WAN = EncoderConfig(vae="wan")
CODEC = EncoderConfig(vae="block_transform")
CHANNELS = 8


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def pixels(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    return noise(3, frames, height, width, seed=seed).mul(0.4).clamp(-1, 1)


def moving_disc(frames: int = 13) -> torch.Tensor:
    """A red disc that crosses a dark blue 64x64 frame, 3 pixels per frame."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    clip = []
    for t in range(frames):
        inside = (12.5 - torch.hypot(x - 14 - 3 * t, y - 32)).clamp(0, 1)
        colours = zip((1.0, -0.6, -0.8), (-0.8, -0.8, -0.2), strict=True)
        clip.append(torch.stack([inside * disc + (1 - inside) * ground for disc, ground in colours]))
    return torch.stack(clip, dim=1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB; the peak-to-peak range of pixels is 2."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.fixture(scope="module")
def wan() -> WanAutoencoder:
    vae = build_vae(WAN, CHANNELS, seed=5)
    assert isinstance(vae, WanAutoencoder)
    return vae


@pytest.mark.parametrize("config", [WAN, CODEC], ids=["wan", "block_transform"])
@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (9, 3)])
def test_shapes(config: EncoderConfig, frames: int, latent_frames: int) -> None:
    vae = build_vae(config, CHANNELS, seed=5)
    latents = vae.encode(pixels(frames))
    assert latents.shape == (latent_frames, 2, 3, vae.latent_channels) and latents.dtype == torch.float32
    decoded = vae.decode(latents)
    assert decoded.shape == (3, frames, 32, 48) and decoded.dtype == torch.float32
    assert not latents.requires_grad and latents.isfinite().all() and decoded.isfinite().all()


def test_wan_weights_are_a_function_of_seed_and_name(wan: WanAutoencoder) -> None:
    state = torch.random.get_rng_state()
    again = build_vae(WAN, CHANNELS, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(wan.encode(pixels(5)), again.encode(pixels(5)))
    assert not torch.equal(wan.encode(pixels(5)), build_vae(WAN, CHANNELS, seed=6).encode(pixels(5)))


def test_wan_is_frozen(wan: WanAutoencoder) -> None:
    assert not any(parameter.requires_grad for parameter in wan.parameters())
    assert not wan.vae.training


def test_wan_is_causal(wan: WanAutoencoder) -> None:
    clip, other = pixels(9, seed=1), pixels(9, seed=2)
    mixed = torch.cat([clip[:, :5], other[:, 5:]], dim=1)
    latents, changed = wan.encode(clip), wan.encode(mixed)
    torch.testing.assert_close(wan.encode(clip[:, :1]), latents[:1])
    torch.testing.assert_close(changed[:2], latents[:2])
    assert (changed[2] - latents[2]).abs().max() > 1e-3
    torch.testing.assert_close(wan.decode(latents)[:, :5], wan.decode(latents[:2]))


def tiled(tile: int) -> WanAutoencoder:
    """The tiny random model, decoding in tiles."""
    vae = build_vae(dataclasses.replace(WAN, vae_tile=tile), CHANNELS, seed=5)
    assert isinstance(vae, WanAutoencoder)
    return vae


def test_wan_tiles_of_whole_frames_change_nothing(wan: WanAutoencoder) -> None:
    latents = noise(2, 4, 4, CHANNELS)
    assert torch.equal(tiled(64).decode(latents), wan.decode(latents))
    assert torch.equal(tiled(64).encode(pixels(5, 96, 128)), wan.encode(pixels(5, 96, 128)))


def test_wan_tiles_are_blended_decodes_of_their_latents(wan: WanAutoencoder) -> None:
    """Two tiles of 4 x 4 cells that share a column of cells: apart from it each decodes as if alone, in it between."""
    latents = noise(2, 4, 7, CHANNELS)
    found = tiled(64).decode(latents)
    left, right = wan.decode(latents[:, :, :4]), wan.decode(latents[:, :, 3:])
    assert found.shape == (3, 5, 64, 112)
    torch.testing.assert_close(found[..., :48], left[..., :48])
    torch.testing.assert_close(found[..., 64:], right[..., 16:])
    share = (torch.arange(16) + 0.5) / 16
    torch.testing.assert_close(found[..., 48:64], left[..., 48:] * (1 - share) + right[..., :16] * share)


def test_wan_tiles_cover_frames_of_any_size(wan: WanAutoencoder) -> None:
    """Equal tiles of equal latents: their mean is what each of them gives, wherever they lie."""
    for height, width in ((6, 4), (5, 9), (13, 4)):
        found = tiled(64).decode(torch.ones(1, height, width, CHANNELS))
        assert found.shape == (3, 1, height * 16, width * 16) and found.isfinite().all()
        alone = wan.decode(torch.ones(1, 4, 4, CHANNELS))
        torch.testing.assert_close(found[..., :16, :16], alone[..., :16, :16])
        torch.testing.assert_close(found[..., -16:, -16:], alone[..., -16:, -16:])


def test_wan_normalises_with_the_published_statistics() -> None:
    vae = WanAutoencoder.build(WAN, 48, seed=5)
    mean, std = (torch.tensor(WAN22_CONFIG[key]) for key in ("latents_mean", "latents_std"))
    assert mean.shape == std.shape == (48,) and std.min() > 0
    clip = pixels(5)
    with torch.no_grad():
        raw = vae.vae.encode(clip[None]).latent_dist.mean[0].permute(1, 2, 3, 0)
        decoded = vae.vae.decode(raw.permute(3, 0, 1, 2)[None]).sample[0]
    latents = vae.encode(clip)
    torch.testing.assert_close(latents * std + mean, raw)
    torch.testing.assert_close(vae.decode(latents), decoded, rtol=1e-4, atol=1e-4)


def test_wan_full_configuration_has_the_published_layout() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan(**WAN22_CONFIG)
    shapes = {name: tuple(value.shape) for name, value in vae.named_parameters()}
    assert shapes["encoder.conv_in.weight"] == (160, 12, 3, 3, 3)
    assert shapes["quant_conv.weight"] == (96, 96, 1, 1, 1)
    assert shapes["decoder.conv_in.weight"] == (1024, 48, 3, 3, 3)
    assert shapes["decoder.conv_out.weight"] == (12, 256, 3, 3, 3)


def test_wan_posterior_sample(wan: WanAutoencoder) -> None:
    sampler = build_vae(dataclasses.replace(WAN, posterior="sample"), CHANNELS, seed=5)
    clip = pixels(5)
    drawn = [sampler.encode(clip, stream(1, "posterior", "clip", epoch)) for epoch in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with torch.no_grad():
        std = wan.vae.encode(clip[None]).latent_dist.std[0].permute(1, 2, 3, 0)
    expected = torch.from_numpy(
        stream(1, "posterior", "clip", 0).standard_normal((CHANNELS, 2, 2, 3), dtype=np.float32)
    ).permute(1, 2, 3, 0)
    torch.testing.assert_close((drawn[0] - wan.encode(clip)) / std, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs a generator"):
        sampler.encode(clip)


def test_wan_bfloat16() -> None:
    vae = WanAutoencoder.build(dataclasses.replace(WAN, dtype="bfloat16"), CHANNELS, seed=5)
    latents = vae.encode(pixels(5))
    assert latents.dtype == vae.decode(latents).dtype == torch.float32
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}


def test_wan_folder_round_trips_exactly(wan: WanAutoencoder, tmp_path: Path) -> None:
    wan.vae.save_pretrained(tmp_path)
    config = dataclasses.replace(WAN, vae_path=str(tmp_path))
    loaded = WanAutoencoder.build(config, CHANNELS, seed=99)
    assert torch.equal(loaded.encode(pixels(5)), wan.encode(pixels(5)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(ValueError, match="z_dim 8, expected 48; .*length of latents_mean 8, expected 48"):
        build_vae(config, 48, seed=0)
    (tmp_path / "config.json").unlink()
    with pytest.raises(EncoderError, match="config.json"):
        build_vae(config, CHANNELS, seed=0)


@pytest.mark.parametrize("channels", [1, 8, 48, 256])
def test_codec_is_exact_on_what_it_keeps(channels: int) -> None:
    codec = BlockTransformCodec(channels)
    latents = noise(3, 2, 3, channels)
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, rtol=1e-4, atol=1e-4)
    assert list(codec.parameters()) == []


@pytest.mark.parametrize("name", ["frame_basis", "group_basis"])
def test_codec_basis_is_orthonormal(name: str) -> None:
    basis = getattr(BlockTransformCodec(48), name)
    torch.testing.assert_close(basis @ basis.T, torch.eye(48))


def test_codec_with_all_coefficients_of_a_picture_is_lossless() -> None:
    codec, picture = BlockTransformCodec(768), pixels(1)
    torch.testing.assert_close(codec.decode(codec.encode(picture)), picture, rtol=1e-4, atol=1e-4)


def test_codec_still_clip_has_the_pictures_leading_coefficients() -> None:
    codec, picture = BlockTransformCodec(48), pixels(1)
    latents = codec.encode(picture.repeat(1, 9, 1, 1))
    leading = 39
    for group in latents[1:]:
        torch.testing.assert_close(group[..., :leading], latents[0, ..., :leading])
        torch.testing.assert_close(group[..., leading:], torch.zeros_like(group[..., leading:]), rtol=0, atol=1e-4)
    assert latents[0, ..., leading:].abs().mean() > 0.1


def test_codec_keeps_a_moving_disc_recognisable() -> None:
    codec, clip = BlockTransformCodec(48), moving_disc()
    decoded = codec.decode(codec.encode(clip)).clamp(-1, 1)
    assert psnr(decoded, clip) > 20
    disc = clip[0] > 0
    assert ((decoded[0] > 0) & disc).sum() / ((decoded[0] > 0) | disc).sum() > 0.85


def test_codec_on_a_photograph() -> None:
    path = shared_path("data", "text2image.parquet")
    for picture in pq.read_table(path)["image_bytes"].to_pylist():
        image = Image.open(io.BytesIO(picture)).convert("RGB")
        image = image.resize((image.width // 32 * 16, image.height // 32 * 16), Image.Resampling.BICUBIC)
        clip = torch.from_numpy(np.array(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[:, None]
        codec = BlockTransformCodec(48)
        latents = codec.encode(clip)
        assert psnr(codec.decode(latents).clamp(-1, 1), clip) > 22
        assert 0.3 < latents.square().mean().sqrt() < 1.7


@pytest.mark.parametrize("config", [WAN, CODEC], ids=["wan", "block_transform"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 32, 32), "shape"),
        (torch.zeros(4, 1, 32, 32), "shape"),
        (torch.zeros(3, 1, 32, 32).byte(), "uint8"),
        (torch.zeros(3, 4, 32, 32), "4 frames: must be 4k"),
        (torch.zeros(3, 1, 40, 32), "40x32 pixels"),
        (torch.zeros(3, 1, 32, 0), "32x0 pixels"),
    ],
)
def test_wrong_pixels(config: EncoderConfig, wrong: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_vae(config, CHANNELS, seed=5).encode(wrong)


@pytest.mark.parametrize("config", [WAN, CODEC], ids=["wan", "block_transform"])
@pytest.mark.parametrize("shape", [(2, 2, CHANNELS), (1, 2, 2, CHANNELS + 1), (0, 2, 2, CHANNELS)])
def test_wrong_latents(config: EncoderConfig, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="latents of shape"):
        build_vae(config, CHANNELS, seed=5).decode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "channels", "message"),
    [
        ({"vae": "vqgan"}, 8, "encoders.vae 'vqgan': unknown"),
        ({"posterior": "mode"}, 8, "encoders.posterior 'mode': unknown"),
        ({"vae": "block_transform", "posterior": "sample"}, 8, "no posterior"),
        ({"vae": "block_transform", "vae_path": "somewhere"}, 8, "no weights"),
        ({"vae": "block_transform"}, 769, "keeps 1 to 768"),
        ({"dtype": "float16"}, 8, "encoders.dtype 'float16'"),
    ],
)
def test_impossible_settings(change: dict, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_vae(dataclasses.replace(WAN, **change), channels, seed=0)
