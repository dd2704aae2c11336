"""Export to the public layout: every key bit for bit, configuration, tokenizer, position table, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from transformers import Qwen2Config

from megatron_lance.checkpoint.digests import digests_of, files_in
from megatron_lance.checkpoint.hf_export import ExportError, export_lance
from megatron_lance.checkpoint.hf_lance import POSITION_KEY, FolderSource, bindings, global_parameters, public_shapes
from megatron_lance.checkpoint.manifest import Checkpoint, DataIdentity, Manifest, StoreError, open_checkpoint
from megatron_lance.checkpoint.public_files import WEIGHTS_FILE
from megatron_lance.checkpoint.tensors import ModelTensors
from megatron_lance.config.schema import RunConfig
from megatron_lance.data.prompt import Tokenizer, TokenizerError
from megatron_lance.model.embedder import LatentPosition
from tests.tiny import TinyRun, write_tokenizer
from tests.unit.tiny_model import build, one_rank

Public = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run(tiny_run: TinyRun) -> RunConfig:
    return tiny_run.load("training.precision=float32")


@pytest.fixture(scope="module")
def trained(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Public]:
    """A checkpoint of a model with random weights, and its public tensors."""
    folder = tmp_path_factory.mktemp("checkpoint")
    table = bindings(run.model)
    with one_rank():
        stage = build(run.model)
        dist_checkpointing.save({"model0": stage.sharded_state_dict()}, str(folder))
        public: Public = {}
        for name, parameter in global_parameters([stage]):
            public |= {key: tensor.clone() for key, tensor in table[name].public([parameter.detach()]).items()}
    data = DataIdentity(Tokenizer(run.data.tokenizer).sha256, "0" * 16)
    Manifest.of(folder, run, 7, 1, data, {}).write(folder, digests_of(folder, files_in(folder)))
    return open_checkpoint(folder), public


@pytest.fixture(scope="module")
def exported(trained: tuple[Checkpoint, Public], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    export_lance(trained[0], out)
    return out


def test_every_public_tensor_is_written_and_read_back_bit_for_bit(
    trained: tuple[Checkpoint, Public], exported: Path, run: RunConfig
) -> None:
    public = trained[1]
    assert public.keys() == public_shapes(run.model).keys()
    found = load_file(exported / WEIGHTS_FILE)
    source = FolderSource(exported, run.model)
    assert found.keys() == {*public, POSITION_KEY}
    for key, tensor in public.items():
        assert found[key].dtype == torch.float32 and torch.equal(found[key], tensor), key
        assert torch.equal(source.get(key, tuple(tensor.shape)), tensor), key


def test_position_table_has_a_row_per_cell(exported: Path, run: RunConfig) -> None:
    table = load_file(exported / WEIGHTS_FILE)[POSITION_KEY]
    frames, size = run.model.latent_position_frames, run.model.latent_position_size
    assert table.shape == (frames * size * size, run.model.hidden_size)
    rows = LatentPosition(frames, size, run.model.hidden_size)
    for cell in [(0, 0, 0), (0, 0, 5), (0, 7, 1), (frames - 1, size - 1, size - 1)]:
        i, j, k = cell
        assert torch.equal(table[i * size * size + j * size + k], rows(torch.tensor([cell]))[0]), cell


def test_configuration_and_tokenizer_lie_beside_the_weights(exported: Path, run: RunConfig) -> None:
    config = json.loads((exported / "llm_config.json").read_text())
    tokenizer = Tokenizer(exported)
    assert (config["video_token_id"], config["vision_start_token_id"]) == (tokenizer.video_pad, tokenizer.vision_start)
    added = json.loads((exported / "tokenizer.json").read_text())["added_tokens"]
    assert [config["image_token_id"]] == [token["id"] for token in added if token["content"] == "<|image_pad|>"]
    assert config["rope_scaling"]["mrope_section"] == list(run.model.mrope_section)
    assert config["vision_config"] == {"spatial_merge_size": 2, "tokens_per_second": 2}
    assert config["torch_dtype"] == "float32" and config["tie_word_embeddings"] is False
    known = Qwen2Config.from_json_file(exported / "llm_config.json")
    assert (known.hidden_size, known.num_hidden_layers, known.intermediate_size, known.vocab_size) == (64, 4, 128, 512)
    assert (known.num_attention_heads, known.num_key_value_heads, known.rms_norm_eps) == (4, 2, 1e-6)
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.im_end
    assert tokenizer.sha256 == Tokenizer(run.data.tokenizer).sha256


def test_dtype_and_force(trained: tuple[Checkpoint, Public], tmp_path: Path) -> None:
    checkpoint, public = trained
    out = tmp_path / "out"
    for _ in range(2):
        export_lance(checkpoint, out, dtype="bfloat16", force=True)
    found = load_file(out / WEIGHTS_FILE)
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    assert all(torch.equal(found[key], tensor.bfloat16()) for key, tensor in public.items())
    assert json.loads((out / "llm_config.json").read_text())["torch_dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ExportError, match="out': exists; give --force"):
        export_lance(checkpoint, out)
    (tmp_path / "other").mkdir()
    with pytest.raises(ExportError, match=r"holds no export.json, so it is no export; name another folder"):
        export_lance(checkpoint, tmp_path / "other", force=True)


def test_tokenizer_must_be_the_runs(
    trained: tuple[Checkpoint, Public], run: RunConfig, tmp_path: Path, exported: Path
) -> None:
    checkpoint = trained[0]
    other = write_tokenizer(tmp_path / "tokenizer", vocab_size=300)
    with pytest.raises(ExportError, match=r"is not the one of the checkpoint; give its folder with --tokenizer"):
        export_lance(checkpoint, tmp_path / "out", tokenizer=other)
    config = {**checkpoint.manifest.config, "data": {**checkpoint.manifest.config["data"], "tokenizer": "gone"}}
    moved = replace(checkpoint, manifest=replace(checkpoint.manifest, config=config))
    with pytest.raises(TokenizerError, match="'gone': has no tokenizer.json"):
        export_lance(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_lance(moved, tmp_path / "out", tokenizer=Path(run.data.tokenizer))
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (exported / WEIGHTS_FILE).read_bytes()


def test_unknown_tensors_are_refused(trained: tuple[Checkpoint, Public]) -> None:
    tensors = ModelTensors(trained[0].folder)
    with pytest.raises(StoreError, match=r"has no tensor decoder.layers.und.mlp.extra"):
        tensors.get("decoder.layers.0.und.mlp.extra")
