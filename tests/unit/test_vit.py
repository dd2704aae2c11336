"""The frozen ViT: patch order, independence of clips, weights by name and from a folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_lance.config.schema import EncoderConfig
from megatron_lance.encoders.vit import VitEncoder, patchify
from megatron_lance.encoders.weights import EncoderError
from tests.unit.released_vit import released_vit

HIDDEN = 48


def clip(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal((3, frames, height, width), dtype=np.float32)
    return torch.from_numpy(values)


@pytest.fixture(scope="module")
def encoder() -> VitEncoder:
    return VitEncoder.build(EncoderConfig(), HIDDEN, seed=3)


def save(
    encoder: VitEncoder, folder: Path, prefix: str = "", edit: Callable[[dict], None] | None = None
) -> EncoderConfig:
    tensors = {prefix + name: value.clone() for name, value in encoder.vision.state_dict().items()}
    if edit is not None:
        edit(tensors)
    save_file(tensors, folder / "vit.safetensors")
    (folder / "config.json").write_text(json.dumps(encoder.vision.config.to_dict()))
    return EncoderConfig(vit_path=str(folder))


def test_patchify_picture_equals_transformers_processor() -> None:
    picture = clip(1, 56, 84)
    expected, rows, columns = Qwen2VLImageProcessorPil().patchify(picture[:, 0].numpy(), 14, 2, 2)
    assert (rows, columns) == (4, 6)
    np.testing.assert_array_equal(patchify(picture, 14, 2, 2).numpy(), expected)


def test_patchify_odd_clip_equals_explicit_loop() -> None:
    pixels = clip(3, 56, 28)
    frames = torch.cat([pixels, pixels[:, -1:]], dim=1)
    rows = [
        frames[:, 2 * t : 2 * t + 2, 28 * h + 14 * a : 28 * h + 14 * a + 14, 28 * w + 14 * b : 28 * w + 14 * b + 14]
        for t in range(2)
        for h in range(2)
        for w in range(1)
        for a in range(2)
        for b in range(2)
    ]
    assert torch.equal(patchify(pixels, 14, 2, 2), torch.stack([row.flatten() for row in rows]))


def test_each_clip_is_independent_of_the_others(encoder: VitEncoder) -> None:
    clips = [clip(1, 28, 28, 1), clip(3, 140, 168, 2), clip(4, 56, 140, 3)]
    together = encoder.encode(clips)
    assert [tuple(rows.shape) for rows in together] == [(1, HIDDEN), (2 * 5 * 6, HIDDEN), (2 * 2 * 5, HIDDEN)]
    for pixels, rows in zip(clips, together, strict=True):
        torch.testing.assert_close(encoder.encode([pixels])[0], rows, rtol=1e-5, atol=1e-5)
        assert rows.dtype == torch.float32 and not rows.requires_grad
        assert 0.1 < rows.std() < 10
    assert encoder.encode([]) == []


def test_rows_are_row_major() -> None:
    """With no blocks a row depends on its own 28x28 pixels alone, so the order shows, across windows too."""
    config = EncoderConfig(small_vit_depth=0)
    encoder = VitEncoder.build(config, HIDDEN, seed=3)
    pixels = clip(4, 140, 168)
    rows = encoder.encode([pixels])[0].view(2, 5, 6, HIDDEN)
    for t, h, w in ((0, 0, 0), (0, 1, 5), (1, 4, 0), (1, 4, 5)):
        cell = pixels[:, 2 * t : 2 * t + 2, 28 * h : 28 * h + 28, 28 * w : 28 * w + 28]
        torch.testing.assert_close(rows[t, h, w], encoder.encode([cell])[0][0], rtol=1e-5, atol=1e-5)


def test_picture_is_doubled_and_odd_clip_repeats_its_last_frame(encoder: VitEncoder) -> None:
    picture, odd = clip(1, 56, 56), clip(3, 56, 56)
    doubled, padded = picture.repeat(1, 2, 1, 1), torch.cat([odd, odd[:, -1:]], dim=1)
    first, second, third, fourth = encoder.encode([picture, doubled, odd, padded])
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(third, fourth)


def test_weights_are_a_function_of_seed_and_name(encoder: VitEncoder) -> None:
    state = torch.random.get_rng_state()
    again = VitEncoder.build(EncoderConfig(), HIDDEN, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    other = VitEncoder.build(EncoderConfig(), HIDDEN, seed=4)
    deeper = VitEncoder.build(EncoderConfig(small_vit_depth=3), HIDDEN, seed=3).vision.state_dict()
    for name, value in encoder.vision.state_dict().items():
        assert torch.equal(value, again.vision.state_dict()[name])
        assert torch.equal(value, deeper[name])
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(encoder.vision.state_dict()[name], other.vision.state_dict()[name])


def test_frozen_and_in_eval_mode(encoder: VitEncoder) -> None:
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.vision.training


def test_bfloat16_keeps_rotary_frequencies() -> None:
    encoder = VitEncoder.build(EncoderConfig(dtype="bfloat16"), HIDDEN, seed=3)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert encoder.vision.rotary_pos_emb.inv_freq.dtype == torch.float32
    assert encoder.encode([clip(1, 28, 56)])[0].dtype == torch.bfloat16


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual.", "vit_model."])
def test_folder_round_trips_exactly(encoder: VitEncoder, tmp_path: Path, prefix: str) -> None:
    def add_language_model(tensors: dict) -> None:
        if prefix:
            tensors["lm_head.weight"] = torch.zeros(2, 2)

    config = save(encoder, tmp_path, prefix, add_language_model)
    loaded = VitEncoder.build(config, HIDDEN, seed=99)
    for name, value in encoder.vision.state_dict().items():
        assert torch.equal(value, loaded.vision.state_dict()[name]), name
    pixels = [clip(2, 56, 56)]
    assert torch.equal(encoder.encode(pixels)[0], loaded.encode(pixels)[0])
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_whole_model_config_and_split_files(encoder: VitEncoder, tmp_path: Path) -> None:
    config = save(encoder, tmp_path)
    tensors = load_file(tmp_path / "vit.safetensors")
    (tmp_path / "vit.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:5]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[5:]}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": encoder.vision.config.to_dict()}))
    loaded = VitEncoder.build(config, HIDDEN, seed=99)
    assert all(torch.equal(value, loaded.vision.state_dict()[name]) for name, value in tensors.items())


def test_one_error_lists_all_tensors_that_do_not_fit(encoder: VitEncoder, tmp_path: Path) -> None:
    def spoil(tensors: dict) -> None:
        del tensors["merger.mlp.0.bias"]
        tensors["blocks.7.norm1.weight"] = torch.ones(3)
        tensors["merger.ln_q.weight"] = torch.ones(5)

    config = save(encoder, tmp_path, edit=spoil)
    with pytest.raises(ValueError, match="do not fit") as error:
        VitEncoder.build(config, HIDDEN, seed=0)
    for part in ("merger.mlp.0.bias: missing", "blocks.7.norm1.weight: unknown", "merger.ln_q.weight: shape (5,)"):
        assert part in str(error.value)


def test_folder_errors(encoder: VitEncoder, tmp_path: Path) -> None:
    config = EncoderConfig(vit_path=str(tmp_path))
    with pytest.raises(EncoderError, match="config.json"):
        VitEncoder.build(config, HIDDEN, seed=0)
    save(encoder, tmp_path, "visual.", lambda tensors: tensors.update({"vit_model.x": torch.ones(1)}))
    with pytest.raises(ValueError, match="visual. and vit_model."):
        VitEncoder.build(config, HIDDEN, seed=0)
    save(encoder, tmp_path)
    save_file({"merger.ln_q.weight": torch.ones(32)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="merger.ln_q.weight: in more.safetensors and in vit.safetensors"):
        VitEncoder.build(config, HIDDEN, seed=0)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(EncoderError, match="safetensors"):
        VitEncoder.build(config, HIDDEN, seed=0)
    with pytest.raises(ValueError, match="out_hidden_size 48.*model.hidden_size 64"):
        VitEncoder.build(config, 64, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"small_vit_hidden": 36}, "multiple of 4"), ({"dtype": "float16"}, "encoders.dtype 'float16'")],
)
def test_impossible_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VitEncoder.build(dataclasses.replace(EncoderConfig(), **change), HIDDEN, seed=0)


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(3, 28, 28), torch.zeros(1, 1, 28, 28), torch.zeros(3, 0, 28, 28), torch.zeros(3, 1, 28, 28).byte()],
)
def test_wrong_clip(encoder: VitEncoder, pixels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="clip 1 of shape"):
        encoder.encode([clip(1, 28, 28), pixels])


def test_wrong_size(encoder: VitEncoder) -> None:
    with pytest.raises(ValueError, match="clip 0 of 28x42 pixels"):
        encoder.encode([clip(1, 28, 42)])


def test_the_released_file_is_read_by_its_names(tmp_path: Path) -> None:
    """Every name of the released vit.safetensors, at tiny sizes, and what the config.json beside it says."""
    shapes = released_vit(depth=32, width=16, ffn=20, out=HIDDEN)
    rng = np.random.default_rng(0)
    tensors = {
        name: torch.from_numpy(0.2 * rng.standard_normal(shape, dtype=np.float32)) for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "vit.safetensors")
    config = {"depth": 32, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": HIDDEN}
    config |= {"in_chans": 3, "patch_size": 14, "spatial_patch_size": 14, "temporal_patch_size": 2}
    config |= {"spatial_merge_size": 2, "window_size": 112, "tokens_per_second": 2}
    content = {**config, "hidden_act": "silu", "fullatt_block_indexes": [7, 15, 23, 31]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    encoder = VitEncoder.build(EncoderConfig(vit_path=str(tmp_path)), HIDDEN, seed=0)
    found = dict(encoder.vision.named_parameters())
    assert len(found) == 390 and found.keys() == tensors.keys()
    assert [name for name, tensor in tensors.items() if not torch.equal(found[name], tensor)] == []
    (rows,) = encoder.encode([clip(2, 56, 84)])
    assert rows.shape == (6, HIDDEN) and bool(rows.isfinite().all())
