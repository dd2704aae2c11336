"""Public folder -> checkpoint -> public folder by the command line: bit for bit, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from megatron_lance.checkpoint.digests import digests_of, files_in
from megatron_lance.checkpoint.flat_shards import FlatShard, sharded
from megatron_lance.checkpoint.hf_export import export_lance, llm_config
from megatron_lance.checkpoint.hf_import import import_lance
from megatron_lance.checkpoint.hf_lance import POSITION_KEY, bindings, global_parameters, public_shapes
from megatron_lance.checkpoint.manifest import DP_RESHARDABLE, DataIdentity, Manifest, open_checkpoint
from megatron_lance.checkpoint.public_files import INDEX_FILE, TensorFolder, TensorSpec, write_folder
from megatron_lance.checkpoint.tensors import EMA_PREFIX
from megatron_lance.checkpoint.view import CheckpointView, position_table
from megatron_lance.config.loader import from_dict
from megatron_lance.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from tests.command import Commander
from tests.tiny import TinyRun, write_tokenizer
from tests.unit.released_vit import released_vit
from tests.unit.tiny_model import build, one_rank

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=512,
    mrope_section=(1, 1, 2),
    rope_inv_freq_dtype="bfloat16",
    mape="paper",
    mape_step=500,
    latent_channels=6,
    latent_position_frames=2,
    latent_position_size=4,
)
IDS = {name: 500 + i for i, name in enumerate(("<|im_end|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"))}
Tensors = dict[str, torch.Tensor]


def release(dtype: torch.dtype = torch.float32, model: ModelConfig = MODEL, vit: bool = True) -> Tensors:
    """Random tensors of a released folder: every public name, the position table, the ViT."""
    rng = np.random.default_rng(0)
    bare = released_vit(depth=2, width=16, ffn=24, out=model.hidden_size) if vit else {}
    shapes = public_shapes(model) | {f"vit_model.{key}": shape for key, shape in bare.items()}
    tensors = {key: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for key, shape in shapes.items()}
    tensors[POSITION_KEY] = torch.cat(list(position_table(model, model.latent_position_frames)))
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def write_release(folder: Path, tensors: Tensors, model: ModelConfig = MODEL, shard_bytes: int | None = None) -> Path:
    """The folder, with a tokenizer; returns it."""
    write_tokenizer(folder)
    specs = {key: TensorSpec(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    write_folder(folder, specs, ((key, [tensor]) for key, tensor in tensors.items()), shard_bytes)
    (folder / "llm_config.json").write_text(json.dumps(llm_config(model, IDS, "float32")))
    return folder


def differing(folder: Path, want: Mapping[str, torch.Tensor]) -> list[str]:
    """Names at which a public folder does not hold these tensors, bit for bit."""
    found = TensorFolder(folder)
    names = [key for key in {**found.specs, **want} if key not in found.specs or key not in want]
    for key in want.keys() & found.specs.keys():
        tensor = found.get(key)
        if tensor.dtype != want[key].dtype or not torch.equal(tensor, want[key]):
            names.append(key)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frames", [1, 2], ids=["image", "video"])
@pytest.mark.parametrize("vit", [True, False], ids=["vit", "no_vit"])
@pytest.mark.parametrize("shard_bytes", [None, 20_000], ids=["one_file", "shards"])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, frames: int, vit: bool, shard_bytes: int | None) -> None:
    model = replace(MODEL, latent_position_frames=frames)
    tensors = release(dtype, model, vit)
    folder = write_release(tmp_path / "in", tensors, model, shard_bytes)
    import_lance(folder, tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    assert from_dict(checkpoint.manifest.config, "import").model == model
    assert (checkpoint.manifest.step, checkpoint.manifest.weights_only) == (0, True)
    export_lance(checkpoint, tmp_path / "out", max_shard_bytes=shard_bytes)
    assert differing(tmp_path / "out", tensors) == []
    assert (tmp_path / "out" / INDEX_FILE).is_file() == (shard_bytes is not None)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "checkpoint", "out"}


def test_a_mixture_of_types_becomes_float32(tmp_path: Path) -> None:
    tensors = release(vit=False)
    mixed = {key: tensor if tensor.dim() == 1 else tensor.bfloat16() for key, tensor in tensors.items()}
    import_lance(write_release(tmp_path / "in", mixed), tmp_path / "checkpoint")
    export_lance(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "out")
    want = {key: tensor.float() for key, tensor in mixed.items()} | {POSITION_KEY: tensors[POSITION_KEY]}
    assert differing(tmp_path / "out", want) == []


def test_rows_of_the_position_table_follow_the_target(tmp_path: Path) -> None:
    """4,096 rows for the image release, 126,976 for the video release (spec/model.md section 1)."""
    tensors = release(model=replace(MODEL, latent_position_frames=1), vit=False)
    import_lance(
        write_release(tmp_path / "in", tensors, replace(MODEL, latent_position_frames=1)), tmp_path / "checkpoint"
    )
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    for target, frames in (("image", 1), ("video", 31), (None, 1)):
        export_lance(checkpoint, tmp_path / "out", target=target, force=True)
        table = TensorFolder(tmp_path / "out").get(POSITION_KEY)
        assert torch.equal(table, torch.cat(list(position_table(MODEL, frames)))) and len(table) == 16 * frames
        import_lance(tmp_path / "out", tmp_path / "again", force=True)


def test_a_vit_may_be_added(tmp_path: Path) -> None:
    """A run's checkpoint holds none, for the ViT is frozen; an imported one keeps it as encoders.vit_path takes it."""
    tensors = release()
    import_lance(write_release(tmp_path / "in", tensors), tmp_path / "with")
    alone = load_file(tmp_path / "with" / "vit" / "vit.safetensors")
    assert {f"vit_model.{key}" for key in alone} == {key for key in tensors if key.startswith("vit_model.")}
    import_lance(write_release(tmp_path / "bare", release(vit=False)), tmp_path / "without")
    export_lance(open_checkpoint(tmp_path / "without"), tmp_path / "out", vit=tmp_path / "with" / "vit")
    assert differing(tmp_path / "out", tensors) == []


def test_without_a_table_or_a_tokenizer(tmp_path: Path) -> None:
    tensors = release()
    del tensors[POSITION_KEY]
    folder = write_release(tmp_path / "in", tensors)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (folder / "tokenizer.json").rename(tokenizer / "tokenizer.json")
    import_lance(folder, tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="was imported without a tokenizer; give --tokenizer DIR"):
        export_lance(checkpoint, tmp_path / "out")
    export_lance(checkpoint, tmp_path / "out", tokenizer=tokenizer, target="image")
    table = torch.cat(list(position_table(MODEL, 1)))
    assert differing(tmp_path / "out", tensors | {POSITION_KEY: table}) == []


def test_everything_that_does_not_fit_is_one_error(tmp_path: Path, command: Commander) -> None:
    tensors = release(vit=False)
    del tensors["vae2llm.bias"]
    tensors |= {"connector.fc1.weight": torch.zeros(2), "llm2vae.bias": torch.zeros(7)}
    write_release(tmp_path / "in", tensors)
    done = command("convert_checkpoint import-lance in out", folder=tmp_path)
    assert done.code == 2 and done.err.count("\n") == 1
    for part in ("1 missing: vae2llm.bias", "1 unknown: connector.fc1.weight", "1 misshapen: llm2vae.bias: found (7,)"):
        assert part in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no configuration": (lambda folder: (folder / "llm_config.json").unlink(), "'in': has no llm_config.json"),
    "torn configuration": (lambda folder: (folder / "llm_config.json").write_text("{"), "is not a JSON object"),
    "empty configuration": (
        lambda folder: (folder / "llm_config.json").write_text("{}"),
        "in/llm_config.json': lacks num_hidden_layers, hidden_size",
    ),
    "another table": (
        lambda folder: change(folder, lambda tensors: tensors[POSITION_KEY].add_(0.1)),
        "differs by up to 0.1 from the table this model computes",
    ),
    "odd table": (
        lambda folder: change(folder, lambda tensors: tensors.update({POSITION_KEY: torch.zeros(17, 32)})),
        "has shape (17, 32), expected frames x 16 rows of 32",
    ),
    "integers": (
        lambda folder: change(folder, lambda tensors: tensors.update({"vae2llm.bias": torch.zeros(32).int()})),
        "weights of dtype int32: must be float32 or bfloat16; convert them",
    ),
}


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, command: Commander) -> None:
    spoil, message = REFUSED[name]
    spoil(write_release(tmp_path / "in", release(vit=False)))
    done = command("convert_checkpoint import-lance in out", folder=tmp_path)
    assert done.code == 2 and message in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_the_command_line(tmp_path: Path, command: Commander) -> None:
    write_release(tmp_path / "in", release(torch.bfloat16))
    for line, code, text in (
        ("import-lance in checkpoint", 0, "start a run from them with training.init_from"),
        ("import-lance in checkpoint", 2, "'checkpoint': exists; give --force to replace it"),
        ("import-lance in in --force", 2, "'in': exists and is no checkpoint; name another folder"),
        ("import-lance in checkpoint --force", 0, "weights of in"),
        ("info checkpoint", 0, "from 'in', weights only"),
        ("info in", 0, f"vit_model {len(released_vit(depth=2))}"),
        ("info nowhere", 2, "'nowhere': no such folder"),
        ("verify in checkpoint", 0, f"{len(release())} tensors: all equal"),
        ("export-lance checkpoint out --max-shard-size 50KB", 0, "weights after step 0 of checkpoint"),
        ("verify in out", 0, "all equal"),
        ("export-lance checkpoint wide --dtype fp32", 0, "weights"),
        ("verify in wide", 1, "vae2llm.bias: bfloat16 and float32"),
        ("export-lance checkpoint image --target image", 0, "weights"),
        ("verify image checkpoint", 1, "latent_pos_embed.pos_embed: shape (16, 32) and (32, 32)\n"),
        ("export-lance checkpoint x --max-shard-size 5", 2, "--max-shard-size '5': must be a number and"),
    ):
        done = command(f"convert_checkpoint {line}", folder=tmp_path)
        found = done.out + done.err
        assert done.code == code and text in found, f"{line}: {done.code} {found}"


def test_verify_lists_every_difference(tmp_path: Path, command: Commander) -> None:
    tensors = release(vit=False)
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    changed["llm2vae.bias"][2] += 0.5
    changed["vae2llm.bias"][0] = -0.0
    tensors["vae2llm.bias"][0] = 0.0
    write_release(tmp_path / "a", tensors)
    del changed["language_model.lm_head.weight"]
    changed["vit_model.merger.mlp.2.bias"] = torch.zeros(4)
    write_release(tmp_path / "b", changed)
    done = command("convert_checkpoint verify a b", folder=tmp_path)
    *lines, total = done.out.splitlines()
    assert done.code == 1 and total == f"{len(tensors) + 1} tensors: 4 differences"
    assert sorted(lines) == [
        "language_model.lm_head.weight: only in the first",
        "llm2vae.bias: values differ by up to 0.5",
        "vae2llm.bias: values differ by up to 0",
        "vit_model.merger.mlp.2.bias: only in the second",
    ]


def high_water() -> int:
    """Most bytes this process has had in memory since `reset_high_water`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def reset_high_water() -> int:
    """Forget the peak so far; returns what is in memory now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak of memory cannot be reset here: {error}")
    return high_water()


def test_an_export_holds_the_largest_tensor_once(tmp_path: Path) -> None:
    model = replace(MODEL, vocab_size=200_000, num_layers=1, hidden_size=64)
    tensors = release(model=model, vit=False)
    import_lance(write_release(tmp_path / "in", tensors, model), tmp_path / "checkpoint")
    largest = max(tensor.nbytes for tensor in tensors.values())
    del tensors
    assert largest > 50e6  # two of them, embeddings and head
    for dtype in (None, "bfloat16"):
        before = reset_high_water()
        export_lance(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", dtype=dtype, force=True)
        assert high_water() - before < 1.2 * largest + 36e6  # a second copy would be 51 MB; the rest is the allocator's


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose averaged weights are cut into two flat shards each, amid a row, as ranks hold them."""
    folder = tmp_path_factory.mktemp("averaged")
    model = replace(MODEL, vocab_size=200_000, num_layers=1, hidden_size=64)
    tokenizer = write_tokenizer(folder / "tokenizer")
    (folder / "checkpoint").mkdir()
    with one_rank():
        stage = build(model)
        states = {"model0": stage.sharded_state_dict()}
        shards = []
        for number, parameter in enumerate(stage.parameters()):
            values, cut = 2.0 * parameter.detach().flatten() + number, int(0.95 * parameter.numel()) + 7
            shards += [
                FlatShard(parameter, at, part) for at, part in ((0, values[:cut]), (cut, values[cut:])) if len(part)
            ]
        dist_checkpointing.save({**states, "ema": sharded(shards, states, EMA_PREFIX)}, str(folder / "checkpoint"))
        save_file(
            {
                key: (2.0 * tensor + number).contiguous()
                for number, (name, parameter) in enumerate(global_parameters([stage]))
                for key, tensor in bindings(model)[name].public([parameter.detach()]).items()
            },
            folder / "want.safetensors",
        )
    run = RunConfig(
        model=model,
        data=DataConfig(tokenizer=str(tokenizer)),
        training=TrainingConfig(ema_decay=0.9, precision="float32"),
    )
    checkpoint = folder / "checkpoint"
    manifest = Manifest.of(checkpoint, run, 1, 1, DataIdentity("", ""), {}, optimizer=DP_RESHARDABLE)
    manifest.write(checkpoint, digests_of(checkpoint, files_in(checkpoint)))
    return folder


def test_averaged_weights_in_flat_shards_are_exported_a_chunk_at_a_time(averaged: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(averaged / "checkpoint")
    largest = 200_000 * 64 * 4
    export_lance(checkpoint, tmp_path / "warm", ema=True)
    before = reset_high_water()
    export_lance(checkpoint, tmp_path / "out", ema=True)
    assert high_water() - before < 1.2 * largest + 24e6
    found, want = load_file(tmp_path / "out" / "model.safetensors"), load_file(averaged / "want.safetensors")
    assert found.keys() == {*want, POSITION_KEY}
    assert [key for key in want if not torch.equal(found[key], want[key])] == []
    view = CheckpointView(checkpoint, ema=True)
    assert [key for key in want if not torch.equal(view.get(key), want[key])] == []


def test_information_names_optimizer_and_average(averaged: Path, tmp_path: Path, command: Commander) -> None:
    done = command("convert_checkpoint info checkpoint", folder=averaged)
    assert done.code == 0 and "optimizer's state: dp_reshardable; averaged weights: with decay 0.9\n" in done.out
    import_lance(write_release(tmp_path / "in", release(vit=False)), tmp_path / "imported")
    done = command("convert_checkpoint info imported", folder=tmp_path)
    assert "optimizer's state: none; averaged weights: none\n" in done.out


@pytest.mark.parametrize("line", ["export-lance checkpoint out", "verify checkpoint in", "verify in checkpoint"])
def test_a_damaged_checkpoint_is_not_read(line: str, tmp_path: Path, command: Commander) -> None:
    import_lance(write_release(tmp_path / "in", release()), tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = command(f"convert_checkpoint {line}", folder=tmp_path)
    assert done.code == 2 and "checkpoint 'checkpoint': is damaged, __0_0.distcp has another sha256" in done.err
    assert not (tmp_path / "out").exists()


def test_a_run_starts_from_what_was_imported(tmp_path: Path, command: Commander, tiny_run: TinyRun) -> None:
    """The same first step from the public folder and from the checkpoint made of it, in another precision."""
    run = tiny_run.load()
    model = replace(run.model, rope_inv_freq_dtype="bfloat16")
    tensors = {key: 0.05 * tensor if "norm" not in key else tensor for key, tensor in release(model=model).items()}
    tensors[POSITION_KEY] *= 20
    write_release(tmp_path / "in", tensors, model)
    assert command("convert_checkpoint import-lance in checkpoint", folder=tmp_path).code == 0
    train = f"train --config {tiny_run.config} training.train_iters=1 training.precision=bf16"
    losses = []
    for source in ("in", "checkpoint"):
        done = command(f"{train} training.run_dir=from_{source} training.init_from={source}", folder=tmp_path)
        assert done.code == 0, done.err
        losses.append(json.loads((tmp_path / f"from_{source}" / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == losses[1] and math.isfinite(losses[0])
    assert "rope_inv_freq_dtype: bfloat16" in (tmp_path / "from_checkpoint" / "config.yaml").read_text()
    done = command(f"{train} training.run_dir=other training.init_from=from_in", folder=tmp_path)
    assert done.code == 0, done.err  # the weights of a run's own checkpoint

    done = command(f"{train} training.run_dir=x training.resume=checkpoint", folder=tmp_path)
    assert done.code == 2 and "holds weights without the state of a run; start a new run from it with" in done.err
    done = command(f"{train} training.run_dir=x training.init_from=checkpoint model.num_layers=2", folder=tmp_path)
    assert done.code == 2 and "weights of checkpoint 'checkpoint' do not fit the model. 56 unknown:" in done.err
    file = tmp_path / "checkpoint" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    done = command(f"{train} training.run_dir=x training.init_from=checkpoint", folder=tmp_path)
    assert done.code == 2 and "checkpoint 'checkpoint': is damaged, __0_0.distcp has another sha256" in done.err
