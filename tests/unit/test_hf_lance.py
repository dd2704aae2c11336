"""The public key layout: local shards and back, QKV order, errors, addressed initial weights, sharded files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lance.checkpoint.hf_lance import (
    Binding,
    FolderSource,
    RandomSource,
    TensorSource,
    bindings,
    check_shapes,
    public_shapes,
)
from megatron_lance.checkpoint.public_files import CheckpointError
from megatron_lance.config.schema import ModelConfig
from megatron_lance.parity.golden import load_config
from tests.shared import shared_path

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=16,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=4,
    vocab_size=16,
    latent_channels=3,
)
TABLE = bindings(MODEL)


def random_tensors(model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in public_shapes(model).items()}


TENSORS = random_tensors()


def shards_of(binding: Binding, tp: int) -> list[torch.Tensor]:
    return [binding.local([TENSORS[key] for key in binding.keys], rank, tp) for rank in range(tp)]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_public_inverts_local(tp: int) -> None:
    seen: set[str] = set()
    for name, binding in TABLE.items():
        shards = shards_of(binding, tp)
        assert len({s.shape for s in shards}) == 1, name
        back = binding.public(shards)
        for key, shape in zip(binding.keys, binding.shapes, strict=True):
            assert back[key].shape == shape
            assert torch.equal(back[key], TENSORS[key]), key
        assert not seen & back.keys(), "no tensor belongs to two parameters"
        seen |= back.keys()
    assert seen == set(public_shapes(MODEL))


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_are_a_tp_th_or_the_whole(tp: int) -> None:
    for name, binding in TABLE.items():
        whole = sum(TENSORS[key].numel() for key in binding.keys)
        sharded = "norm" not in name and name.startswith(("decoder.", "heads.lm_head", "embedder.word"))
        assert (binding.shard_dim is not None) == sharded, name
        assert {s.numel() for s in shards_of(binding, tp)} == {whole // tp if sharded else whole}, name


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize(("expert", "suffix"), [("und", ""), ("gen", "_moe_gen")])
def test_qkv_is_interleaved_per_group(what: str, expert: str, suffix: str) -> None:
    """Head by head: [q0 q1 k0 v0 | q2 q3 k1 v1 | ...], and a tp rank holds whole groups in order."""
    d, per_group = MODEL.kv_channels, MODEL.num_attention_heads // MODEL.num_query_groups
    q, k, v = (TENSORS[f"language_model.model.layers.1.self_attn.{x}_proj{suffix}.{what}"] for x in "qkv")

    def head(x: torch.Tensor, index: int) -> torch.Tensor:
        return x[index * d : (index + 1) * d]

    pieces = []
    for group in range(MODEL.num_query_groups):
        pieces += [head(q, group * per_group + i) for i in range(per_group)]
        pieces += [head(k, group), head(v, group)]
    want = torch.cat(pieces)
    binding = TABLE[f"decoder.layers.1.{expert}.self_attention.linear_qkv.{what}"]
    for tp in (1, 2, 4):
        assert torch.equal(torch.cat(shards_of(binding, tp)), want)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_fc1_holds_a_shard_of_gate_and_a_shard_of_up(tp: int) -> None:
    gate, up = (TENSORS[f"language_model.model.layers.0.mlp_moe_gen.{x}_proj.weight"] for x in ("gate", "up"))
    size = MODEL.ffn_hidden_size // tp
    for rank, shard in enumerate(shards_of(TABLE["decoder.layers.0.gen.mlp.linear_fc1.weight"], tp)):
        rows = slice(rank * size, (rank + 1) * size)
        assert torch.equal(shard, torch.cat([gate[rows], up[rows]]))


@pytest.mark.parametrize(
    ("name", "key", "dim"),
    [
        ("self_attention.linear_proj.weight", "self_attn.o_proj.weight", 1),
        ("mlp.linear_fc2.weight", "mlp.down_proj.weight", 1),
    ],
)
def test_row_parallel_weights_are_sharded_by_input(name: str, key: str, dim: int) -> None:
    want = TENSORS[f"language_model.model.layers.0.{key}"].chunk(2, dim)
    for shard, piece in zip(shards_of(TABLE[f"decoder.layers.0.und.{name}"], 2), want, strict=True):
        assert torch.equal(shard, piece)


def test_key_count_is_the_releases() -> None:
    """1021 tensors in the image checkpoint, the position table among them (spec/model.md section 9)."""
    keys = public_shapes(ModelConfig())
    assert len(keys) + 1 == 1021
    assert sum(math.prod(shape) for shape in keys.values()) == 6_176_817_200


def test_keys_are_those_of_the_golden_weights() -> None:
    folder = shared_path("golden")
    found = {k: tuple(t.shape) for k, t in load_file(folder / "weights.safetensors").items()}
    wanted = public_shapes(load_config(folder).model)
    assert {k: s for k, s in found.items() if not k.startswith("latent_pos_embed.")} == wanted


def through_tensors(tensors: dict[str, torch.Tensor], folder: Path) -> TensorSource:
    return TensorSource(tensors, MODEL)


def through_files(tensors: dict[str, torch.Tensor], folder: Path) -> FolderSource:
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    return FolderSource(folder, MODEL)


SOURCES: list[Callable[[dict[str, torch.Tensor], Path], TensorSource | FolderSource]] = [through_tensors, through_files]


@pytest.mark.parametrize("source", SOURCES)
def test_all_problems_are_listed_together(source: Callable[..., object], tmp_path: Path) -> None:
    tensors = dict(TENSORS)
    del tensors["vae2llm.bias"], tensors["language_model.model.norm.weight"]
    tensors |= {
        "language_model.model.layers.2.mlp.up_proj.weight": torch.zeros(1),
        "connector.fc1.weight": torch.zeros(1),
    }
    tensors |= {"llm2vae.bias": torch.zeros(4), "language_model.lm_head.weight": torch.zeros(24, 16)}
    with pytest.raises(CheckpointError) as caught:
        source(tensors, tmp_path)
    message = str(caught.value)
    missing, unknown, misshapen = message.split(". ", 1)[1].split(". ")
    assert (
        missing.startswith("2 missing: ")
        and "vae2llm.bias" in missing
        and "language_model.model.norm.weight" in missing
    )
    assert unknown.startswith("2 unknown: ") and "layers.2.mlp.up_proj" in unknown and "connector.fc1" in unknown
    assert misshapen.startswith("2 misshapen: ") and "llm2vae.bias: found (4,), the model needs (3,)" in misshapen
    assert "language_model.lm_head.weight: found (24, 16), the model needs (16, 24)" in misshapen


@pytest.mark.parametrize("source", SOURCES)
def test_tensors_come_back_by_key(source: Callable[..., TensorSource | FolderSource], tmp_path: Path) -> None:
    extra = {"latent_pos_embed.pos_embed": torch.zeros(2, 24), "vit_model.blocks.0.norm1.weight": torch.zeros(3)}
    made = source(TENSORS | extra, tmp_path)
    for key, tensor in TENSORS.items():
        assert torch.equal(made.get(key, tuple(tensor.shape)), tensor)


def test_untied_heads_are_demanded() -> None:
    """A checkpoint without its own LM head is refused rather than tied."""
    shapes = public_shapes(MODEL)
    del shapes["language_model.lm_head.weight"]
    with pytest.raises(CheckpointError, match="1 missing: language_model.lm_head.weight"):
        check_shapes(shapes, MODEL, "a test")


def test_a_folder_may_hold_several_files(tmp_path: Path) -> None:
    for index in range(3):
        part = {k: t for i, (k, t) in enumerate(TENSORS.items()) if i % 3 == index}
        save_file(part, tmp_path / f"model-0000{index + 1}-of-00003.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = FolderSource(str(tmp_path), MODEL)
    for key, tensor in TENSORS.items():
        assert torch.equal(source.get(key, tuple(tensor.shape)), tensor)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        FolderSource(tmp_path, MODEL)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere': no \*.safetensors file"):
        FolderSource(tmp_path / "nowhere", MODEL)


def test_random_weights_depend_on_seed_and_key_only() -> None:
    """Whatever else the model holds, in whatever order they are asked for."""
    small = replace(MODEL, num_layers=1)
    first, other_seed, fewer = RandomSource(1, MODEL), RandomSource(2, MODEL), RandomSource(1, small)
    want = {key: first.get(key, shape) for key, shape in public_shapes(MODEL).items()}
    for key, shape in reversed(public_shapes(small).items()):
        assert torch.equal(fewer.get(key, shape), want[key]), key
    differing = [k for k, t in want.items() if not torch.equal(other_seed.get(k, tuple(t.shape)), t)]
    matrices = [k for k, t in want.items() if t.dim() > 1]
    assert set(differing) == {
        *matrices,
        "vae2llm.bias",
        "llm2vae.bias",
        "time_embedder.mlp.0.bias",
        "time_embedder.mlp.2.bias",
    }
    drawn = [tuple(t.flatten()[:4].tolist()) for k, t in want.items() if k in differing]
    assert len(set(drawn)) == len(drawn), "no two parameters share a stream"


def test_random_weights_are_the_initialisation_of_the_spec() -> None:
    source = RandomSource(1, ModelConfig())
    shapes = public_shapes(ModelConfig())
    layer = "language_model.model.layers.0."
    for key in (
        f"{layer}self_attn.q_norm.weight",
        f"{layer}input_layernorm_moe_gen.weight",
        "language_model.model.norm.weight",
    ):
        assert torch.equal(source.get(key, shapes[key]), torch.ones(shapes[key]))
    bias = f"{layer}self_attn.k_proj_moe_gen.bias"
    assert not source.get(bias, shapes[bias]).any()
    proj = source.get(f"{layer}self_attn.k_proj.weight", shapes[f"{layer}self_attn.k_proj.weight"])
    assert proj.dtype == torch.float32 and float(proj.std()) == pytest.approx(0.02, rel=0.01)
    for module, fan_in in (("vae2llm", 48), ("llm2vae", 2048), ("time_embedder.mlp.0", 256)):
        for part in ("weight", "bias"):
            tensor, bound = source.get(f"{module}.{part}", shapes[f"{module}.{part}"]), 1 / math.sqrt(fan_in)
            assert tensor.dtype == torch.float32 and float(tensor.abs().max()) <= bound
            assert float(tensor.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
