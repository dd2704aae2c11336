"""What import and export refuse: folders not theirs to replace, ViTs and settings that cannot be, full disks."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lance.checkpoint.hf_export import export_lance
from megatron_lance.checkpoint.hf_import import import_lance
from megatron_lance.checkpoint.hf_lance import with_rope_of
from megatron_lance.checkpoint.manifest import MANIFEST_FILE, open_checkpoint
from megatron_lance.checkpoint.public_config import VARIANTS
from megatron_lance.checkpoint.public_files import CheckpointError
from megatron_lance.config.loader import from_dict
from megatron_lance.config.schema import ModelConfig
from tests.command import Commander
from tests.unit.test_conversion import MODEL, differing, release, write_release


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """A folder with `in`, a ViT in it, and `checkpoint`, made of it."""
    import_lance(write_release(tmp_path / "in", release()), tmp_path / "checkpoint")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_training_checkpoint_is_never_replaced(imported: Path, command: Commander) -> None:
    manifest = imported / "checkpoint" / MANIFEST_FILE
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "weights_only": False}))
    before = files(imported)
    for name in ("import-lance", "import-qwen"):
        done = command(f"convert_checkpoint {name} in checkpoint --force", folder=imported)
        assert done.code == 2
    done = command("convert_checkpoint import-lance in checkpoint --force", folder=imported)
    assert "'checkpoint': is a checkpoint of a run, with the state of its optimizer, and no import; name" in done.err
    assert files(imported) == before


def test_files_that_no_import_wrote_are_kept(imported: Path, command: Commander) -> None:
    (imported / "checkpoint" / "checkpoints").mkdir()
    (imported / "checkpoint" / "checkpoints" / "latest").write_text("step_00000004\n")
    done = command("convert_checkpoint import-lance in checkpoint --force", folder=imported)
    assert done.code == 2 and "'checkpoint': holds files that no import wrote: checkpoints/latest; name" in done.err
    assert (imported / "checkpoint" / "checkpoints" / "latest").is_file()


def test_files_that_no_export_wrote_are_kept(imported: Path, command: Commander) -> None:
    export = "convert_checkpoint export-lance checkpoint"
    before = files(imported / "in")
    done = command(f"{export} in --force", folder=imported)
    assert done.code == 2 and "'in': exists and holds no export.json, so it is no export; name another" in done.err
    assert files(imported / "in") == before
    for _ in range(2):
        done = command(f"{export} out --force", folder=imported)
        assert done.code == 0, done.err
    (imported / "out" / "Wan2.2_VAE.pth").write_bytes(b"weights")
    done = command(f"{export} out --force", folder=imported)
    assert done.code == 2 and "'out': holds files that no export wrote: Wan2.2_VAE.pth; name another" in done.err
    assert (imported / "out" / "Wan2.2_VAE.pth").read_bytes() == b"weights"
    import_lance(imported / "out", imported / "again")


def test_a_vit_is_checked_with_the_rest(tmp_path: Path, command: Commander) -> None:
    tensors = release()
    del tensors["vit_model.blocks.1.mlp.up_proj.bias"], tensors["vae2llm.bias"]
    tensors |= {"vit_model.typo.weight": torch.zeros(2), "vit_model.merger.mlp.2.bias": torch.zeros(7)}
    write_release(tmp_path / "in", tensors)
    done = command("convert_checkpoint import-lance in out", folder=tmp_path)
    assert done.code == 2 and done.err.count("\n") == 1
    for part in (
        "2 missing: vae2llm.bias; vit_model.blocks.1.mlp.up_proj.bias",
        "1 unknown: vit_model.typo.weight",
        "1 misshapen: vit_model.merger.mlp.2.bias: found (7,), the model needs (32,)",
    ):
        assert part in done.err
    assert not (tmp_path / "out").exists()


def test_a_vit_to_add_is_checked(imported: Path, command: Commander) -> None:
    export = "convert_checkpoint export-lance checkpoint out --vit"
    done = command(f"{export} in", folder=imported)
    assert done.code == 2 and "weights of --vit 'in' do not fit the model." in done.err
    vit = imported / "checkpoint" / "vit" / "vit.safetensors"
    (imported / "other").mkdir()
    save_file({**load_file(vit), "merger.ln_q.weight": torch.zeros(3)}, imported / "other" / "vit.safetensors")
    done = command(f"{export} other", folder=imported)
    assert done.code == 2 and "1 misshapen: merger.ln_q.weight: found (3,), the model needs (16,)" in done.err
    assert not (imported / "out").exists()


@pytest.mark.parametrize("shape", [(), (0,), (3,)], ids=str)
def test_no_vit_has_such_tensors(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Sizes are read off tensors that may have any shape."""
    for name in (
        "patch_embed.proj.weight",
        "blocks.0.norm1.weight",
        "blocks.0.mlp.gate_proj.weight",
        "merger.mlp.0.weight",
    ):
        folder = write_release(tmp_path / "in", release())
        save_file(release() | {f"vit_model.{name}": torch.zeros(shape)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="misshapen"):
            import_lance(folder, tmp_path / "out")


@pytest.mark.parametrize("change", [{"mape": "none", "mape_step": 7}, {"qk_norm": False}, {}], ids=str)
def test_settings_of_the_model_survive_a_round_trip(change: dict[str, Any], tmp_path: Path) -> None:
    model = replace(MODEL, rope_inv_freq_dtype="float32", **change)
    import_lance(write_release(tmp_path / "in", release(model=model, vit=False), model), tmp_path / "checkpoint")
    export_lance(open_checkpoint(tmp_path / "checkpoint"), tmp_path / "out")
    import_lance(tmp_path / "out", tmp_path / "again")
    assert from_dict(open_checkpoint(tmp_path / "again").manifest.config, "import").model == model


def edit_config(folder: Path, **changes: object) -> None:
    """Change llm_config.json; None of VARIANTS: leave it out."""
    path = folder / "llm_config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({key: value for key, value in values.items() if key not in VARIANTS or value is not None})
    )


def test_a_released_configuration_names_none_of_them(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "in", release(vit=False))
    edit_config(folder, **{**dict.fromkeys(VARIANTS), "latent_position_size": 4})
    import_lance(folder, tmp_path / "checkpoint")
    model = from_dict(open_checkpoint(tmp_path / "checkpoint").manifest.config, "import").model
    assert model == replace(MODEL, mape="release", mape_step=1000, rope_inv_freq_dtype="bfloat16")


def test_weights_trained_otherwise_are_warned_of(imported: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in (imported / "in", imported / "checkpoint"):
        assert with_rope_of(replace(MODEL, rope_inv_freq_dtype=None), folder) == MODEL
        assert [record for record in caplog.records if record.levelname == "WARNING"] == []
        with_rope_of(replace(MODEL, mape="release", rotary_base=3.0), folder)
        assert f"model.mape is release, but the weights of {folder} were trained with paper" in caplog.text
        assert f"model.rotary_base is 3.0, but the weights of {folder} were trained with" in caplog.text
        caplog.clear()
    with pytest.raises(CheckpointError, match='rope_inv_freq_dtype = "fp16": must be float32 or bfloat16'):
        edit_config(imported / "in", rope_inv_freq_dtype="fp16")
        with_rope_of(ModelConfig(), imported / "in")


IMPOSSIBLE: dict[str, tuple[dict[str, object], str]] = {
    "text for a number": ({"num_hidden_layers": "3"}, 'num_hidden_layers = "3": must be a positive integer'),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads = 0: must be a positive integer"),
    "truth for a number": ({"vocab_size": True}, "vocab_size = true: must be a positive integer"),
    "several": (
        {"hidden_size": 1.5, "rms_norm_eps": "x"},
        'hidden_size = 1.5: must be a positive integer; rms_norm_eps = "x"',
    ),
    "no sections": (
        {"rope_scaling": {"mrope_section": None}},
        "rope_scaling.mrope_section = null: must be a list of three counts",
    ),
    "sections of another head": (
        {"rope_scaling": {"mrope_section": [1, 1, 3]}},
        "the sum of mrope_section [1, 1, 3] half of",
    ),
    "list of rotations": ({"rope_scaling": [1]}, "rope_scaling = [1]: must be an object"),
    "groups": ({"num_key_value_heads": 3}, "num_attention_heads 8 must be a multiple of num_key_value_heads 3"),
    "no table": ({"latent_position_size": 0}, "latent_position_size = 0: must be a positive integer"),
    "dtype": ({"rope_inv_freq_dtype": "fp16"}, 'rope_inv_freq_dtype = "fp16": must be float32 or bfloat16'),
    "positions": ({"mape": ["paper"]}, 'mape = ["paper"]: must be one of release, paper, none'),
    "norms": ({"qk_norm": 1}, "qk_norm = 1: must be true or false"),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("released") / "in", release(vit=False))


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_configurations(name: str, released: Path, tmp_path: Path, command: Commander) -> None:
    changes, message = IMPOSSIBLE[name]
    text = (released / "llm_config.json").read_text()
    edit_config(released, **changes)
    done = command(f"convert_checkpoint import-lance {released} out", folder=tmp_path)
    (released / "llm_config.json").write_text(text)
    assert done.code == 2 and done.err.count("\n") == 1 and message in done.err, done.err
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that takes no larger file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "import": lambda folder, out: import_lance(folder / "in", out),
    "export": lambda folder, out: export_lance(open_checkpoint(folder / "checkpoint"), out),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_takes_no_more(name: str, imported: Path) -> None:
    write, before = WRITERS[name], files(imported)
    for size in (100_000, 1):
        with (
            files_of_at_most(size),
            pytest.raises(CheckpointError, match=r"out': cannot be written \(.*File too large.*\); make"),
        ):
            write(imported, imported / "out")
    with pytest.raises(
        CheckpointError, match=r"out': cannot be written \(.*Not a directory.*\); make room, or correct"
    ):
        write(imported, imported / "in" / "llm_config.json" / "out")
    assert files(imported) == before
    assert {path.name for path in imported.iterdir()} == {"in", "checkpoint"}
    assert differing(imported / "in", release()) == []
