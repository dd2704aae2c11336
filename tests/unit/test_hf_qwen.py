"""A random Qwen2.5-VL made by transformers, imported: our understanding path gives its logits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from megatron_lance.checkpoint.hf_lance import public_shapes
from megatron_lance.checkpoint.hf_qwen import import_qwen
from megatron_lance.checkpoint.hf_vit import expected_shapes, vit_shapes
from megatron_lance.checkpoint.manifest import open_checkpoint
from megatron_lance.checkpoint.public_files import CheckpointError
from megatron_lance.checkpoint.store import load_model
from megatron_lance.checkpoint.view import CheckpointView
from megatron_lance.config.loader import from_dict
from megatron_lance.config.schema import EncoderConfig, ModelConfig, ParallelConfig
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.model.heads import HeadOutputs
from megatron_lance.model.lance_model import build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.packing.attention_plan import AttentionPlan, AttentionSlice
from megatron_lance.packing.batch import PackNoise, PackTokens, PackVisuals
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.parallel.dispatch import rank_batch
from tests.command import Commander
from tests.unit.released_vit import released_vit
from tests.unit.tiny_model import one_rank

VOCABULARY, HIDDEN = 96, 32
START, END, IMAGE, VIDEO = 90, 91, 92, 93
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}


def make_qwen(tied: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights; biases and norms are not trivial."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config=VISION,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


NEWER, OLDER = ("model.language_model.", "model.visual."), ("model.", "visual.")
"""Prefixes of language model and ViT in the two key layouts that transformers has written."""


def save_qwen(model: Qwen2_5_VLForConditionalGeneration, folder: Path, layout: tuple[str, str] = NEWER) -> Path:
    """Save as transformers does, with the names and the configuration of one of the layouts; returns the folder."""
    model.save_pretrained(folder)
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        name = key
        for i in (0, 1):  # language model, ViT
            for prefix in (NEWER[i], OLDER[i]):
                if key.startswith(prefix) and not key.startswith(NEWER[1 - i]):
                    name = layout[i] + key.removeprefix(prefix)
                    break
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    if layout == OLDER:
        config = json.loads((folder / "config.json").read_text())
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        text |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        (folder / "config.json").write_text(json.dumps({**text, **config}))
    return folder


@pytest.fixture(scope="module")
def qwen() -> Qwen2_5_VLForConditionalGeneration:
    return make_qwen()


@pytest.fixture(scope="module")
def folder(qwen: Qwen2_5_VLForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(qwen, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "qwen"
    import_qwen(folder, out, seed=5)
    return out


def pixels(frames: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal((3, frames, height, width), dtype=np.float32))


def words(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, START, count).tolist()


@pytest.fixture(scope="module")
def _groups() -> Iterator[None]:
    with one_rank():
        yield


# What stands between two texts: the kind of transformers' token, frames and pixels of the clip.  In the clip two steps
# of time are no longer than a side: further than that versions of transformers differ in where the text goes on.
CLIPS = {"text": None, "image": (IMAGE, 1, 84, 112), "video": (VIDEO, 4, 112, 84)}


@pytest.mark.parametrize("kind", CLIPS)
def test_our_understanding_path_gives_transformers_logits(
    qwen: Qwen2_5_VLForConditionalGeneration, imported: Path, _groups: None, kind: str
) -> None:
    checkpoint = open_checkpoint(imported)
    stored = from_dict(checkpoint.manifest.config, "import").model
    # transformers has no QK-norm, does not shift positions, and masks visual tokens causally
    model = replace(stored, qk_norm=False, mape="none")
    (stage,) = build_stages(transformer_config(model, ParallelConfig(), "float32"), model, VOCABULARY)
    load_model(checkpoint, [stage])

    before, after = words(5, 2), words(7, 3)
    clip, inputs, vit, segments = CLIPS[kind], {}, torch.zeros(0, HIDDEN), [Segment.text(12)]
    ids = before + after
    if clip is not None:
        token, frames, height, width = clip
        encoder = VitEncoder.build(EncoderConfig(vit_path=str(imported / "vit")), HIDDEN, seed=0)
        media = pixels(frames, height, width)
        vit = encoder.encode([media])[0]
        t, h, w = math.ceil(frames / 2), height // 28, width // 28
        ids = [*before, START, *[token] * (t * h * w), END, *after]
        segments = [Segment.text(5), Segment.visual(SegmentKind.VIT, (t, h, w)), Segment.text(7)]
        inputs = vision_inputs(media, token, (t, 2 * h, 2 * w), ids)
    with torch.no_grad():
        want = qwen(input_ids=torch.tensor([ids]), use_cache=False, **inputs).logits[0]

    pack = Pack((Sample("s", Task.T2T, tuple(segments), ((1, len(ids)),)),), len(ids) + 3)
    empty = torch.zeros(0, model.latent_channels)
    visuals = PackVisuals(vit, empty, torch.ones(1 if clip else 0, dtype=torch.bool))
    noise = PackNoise(torch.zeros(0), empty, torch.zeros(0, dtype=torch.bool))
    tokens = PackTokens.from_ids(pack, torch.tensor(ids))
    layout = Layout.build(pack, 1, 1, 4)
    batch = rank_batch(pack, layout, tokens, visuals, noise, mape=Mape.NONE, mape_step=1000, cp_rank=0, tp_rank=0)
    causal = AttentionPlan(len(ids), (AttentionSlice((0, len(ids)), ((0, len(ids)),), True),))
    with torch.no_grad():
        got = stage(replace(batch, plan=causal))
        full = stage(batch)
    assert isinstance(got, HeadOutputs) and isinstance(full, HeadOutputs)
    assert got.logits.shape == (len(ids) - 1, VOCABULARY) and float(want.std()) > 0.3
    torch.testing.assert_close(got.logits, want[:-1], rtol=1e-5, atol=1e-5)
    assert torch.allclose(full.logits, want[:-1], rtol=1e-5, atol=1e-5) == (clip is None)


def vision_inputs(
    media: torch.Tensor, token: int, grid: tuple[int, int, int], ids: list[int]
) -> dict[str, torch.Tensor]:
    """What transformers' model takes beside the token ids, patches cut by an explicit loop."""
    t, h, w = grid
    media = media.repeat(1, 2, 1, 1) if media.shape[1] == 1 else media
    rows = [
        media[:, 2 * i : 2 * i + 2, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14].flatten()
        for i in range(t)
        for top in range(0, h, 2)
        for left in range(0, w, 2)
        for y in (top, top + 1)
        for x in (left, left + 1)
    ]
    kinds = torch.tensor([[{IMAGE: 1, VIDEO: 2}.get(i, 0) for i in ids]])
    if token == IMAGE:
        return {"pixel_values": torch.stack(rows), "image_grid_thw": torch.tensor([grid]), "mm_token_type_ids": kinds}
    return {
        "pixel_values_videos": torch.stack(rows),
        "video_grid_thw": torch.tensor([grid]),
        "second_per_grid_ts": torch.tensor([1.0]),
        "mm_token_type_ids": kinds,
    }


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    view = CheckpointView(open_checkpoint(out))
    return {key: view.get(key) for key in view.specs}


def test_every_tensor_starts_as_the_spec_says(qwen: Qwen2_5_VLForConditionalGeneration, imported: Path) -> None:
    found, weights = tensors_of(imported), qwen.state_dict()
    model = from_dict(open_checkpoint(imported).manifest.config, "import").model
    assert (model.rope_inv_freq_dtype, model.mrope_section, model.latent_position_frames) == ("float32", (1, 1, 2), 31)
    seen = set()
    for key, shape in public_shapes(model).items():
        own = key.replace("language_model.model.", "model.language_model.").replace("_moe_gen", "")
        own = own.replace("language_model.lm_head", "lm_head")
        if own in weights:
            assert torch.equal(found[key], weights[own]), key
            seen.add(own)
        elif "_norm" in key:
            assert torch.equal(found[key], torch.ones(shape)), key
        else:
            fan_in = public_shapes(model)[key.replace(".bias", ".weight")][-1]
            assert 0.5 / math.sqrt(fan_in) < found[key].abs().max() <= 1 / math.sqrt(fan_in), key
            assert key.startswith(("vae2llm.", "llm2vae.", "time_embedder."))
    vit = {key for key in weights if key.startswith("model.visual.")}
    assert seen | vit == set(weights)
    for key in vit:
        assert torch.equal(found["vit_model." + key.removeprefix("model.visual.")], weights[key]), key


def test_both_key_layouts_and_a_tied_head(folder: Path, imported: Path, tmp_path: Path) -> None:
    for name, layout, tied in (("older", OLDER, False), ("tied", NEWER, True), ("tied_older", OLDER, True)):
        source = save_qwen(make_qwen(tied), tmp_path / name, layout)
        keys = set(load_file(source / "model.safetensors"))
        assert {f"{layout[0]}norm.weight", f"{layout[1]}merger.ln_q.weight"} <= keys
        assert ("lm_head.weight" in keys) != tied
        import_qwen(source, tmp_path / f"{name}_out", seed=5)
        found, want = tensors_of(tmp_path / f"{name}_out"), tensors_of(imported)
        if tied:
            want["language_model.lm_head.weight"] = want["language_model.model.embed_tokens.weight"] = found[
                "language_model.model.embed_tokens.weight"
            ]
            assert torch.equal(*(found[f"language_model.{key}.weight"] for key in ("lm_head", "model.embed_tokens")))
        assert found.keys() == want.keys()
        assert [key for key in want if not torch.equal(found[key], want[key]) and not tied] == []


def test_only_connectors_follow_the_seed(folder: Path, imported: Path, tmp_path: Path, command: Commander) -> None:
    done = command(f"convert_checkpoint import-qwen {folder} out --seed 6", folder=tmp_path)
    assert done.code == 0 and f"out: weights of {folder}" in done.out, done.err
    assert command(f"convert_checkpoint import-qwen {folder} out", folder=tmp_path).code == 2
    found, want = tensors_of(tmp_path / "out"), tensors_of(imported)
    changed = {key.split(".")[0] for key in want if not torch.equal(found[key], want[key])}
    assert changed == {"vae2llm", "llm2vae", "time_embedder"}


def test_bfloat16_weights_stay_bfloat16(folder: Path, tmp_path: Path) -> None:
    half = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    import_qwen(save_qwen(half, tmp_path / "in"), tmp_path / "out", seed=5)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_all_tensors_that_do_not_fit_are_listed_together(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.norm.weight"], tensors["model.visual.merger.ln_q.weight"]
    tensors |= {"model.language_model.layers.9.mlp.up_proj.weight": torch.zeros(1), "lm_head.weight": torch.zeros(2, 2)}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        import_qwen(tmp_path / "in", tmp_path / "out", seed=5)
    for part in (
        "2 missing: model.language_model.norm.weight; model.visual.merger.ln_q.weight",
        "1 unknown: model.language_model.layers.9.mlp.up_proj.weight",
        f"1 misshapen: lm_head.weight: found (2, 2), the model needs ({VOCABULARY}, {HIDDEN})",
    ):
        assert part in str(caught.value)
    (tmp_path / "in" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="lacks vision_config; give a Qwen2.5-VL model"):
        import_qwen(tmp_path / "in", tmp_path / "out", seed=5)
    (tmp_path / "in" / "config.json").write_text('{"vision_config": {}, "hidden_size": 8}')
    with pytest.raises(CheckpointError, match=r"config.json': lacks num_hidden_layers, .*rope_theta, rope_scaling"):
        import_qwen(tmp_path / "in", tmp_path / "out", seed=5)
    assert not (tmp_path / "out").exists()


def test_the_released_vit_has_the_public_names() -> None:
    """390 tensors under the bare names, which with the 1021 of the image checkpoint are the video checkpoint's 1411."""
    config = Qwen2_5_VLVisionConfig(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048
    )
    want = released_vit()
    assert vit_shapes(config) == expected_shapes(want, 2048) == want and len(want) == 390
    assert len(public_shapes(ModelConfig())) + 1 + len(want) == 1411
