"""Which checkpoint a run goes on from: choices of training.resume, killed saves, damage, other runs' checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lance.checkpoint.digests import digests_of, files_in, read_digests, text_digest, write_digests
from megatron_lance.checkpoint.files import partial_folder, publish, write_text
from megatron_lance.checkpoint.manifest import (
    DP_RESHARDABLE,
    FULLY_RESHARDABLE,
    LATEST_FILE,
    MANIFEST_FILE,
    PER_PARAMETER,
    DataIdentity,
    Manifest,
    StoreError,
    changed_settings,
    check_resumable,
    checkpoint_at,
    checkpoints_folder,
    find_checkpoint,
    open_checkpoint,
    step_folder,
)
from megatron_lance.config.code_version import code_version
from megatron_lance.config.loader import ConfigError, from_dict, load_config, to_dict
from megatron_lance.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from tests.shared import REPOSITORY

DATA = DataIdentity("t" * 64, "0123456789abcdef")
BROKEN = {("clips", "a.parquet", 3, "video_bytes"): "truncated video"}
TENSORS = b"tensors"


def run_in(folder: Path, resume: str | int = "") -> RunConfig:
    return RunConfig(training=TrainingConfig(run_dir=str(folder), resume=resume))


def fill(folder: Path, run: RunConfig, step: int, optimizer: str = DP_RESHARDABLE) -> None:
    """The files of a checkpoint, the manifest last."""
    (folder / "__0_0.distcp").write_bytes(TENSORS * step)
    manifest = Manifest.of(folder, run, step, 1, DATA, BROKEN, optimizer=optimizer)
    manifest.write(folder, digests_of(folder, files_in(folder)))


def write_checkpoint(run: RunConfig, step: int, optimizer: str = DP_RESHARDABLE) -> Path:
    """A checkpoint without tensors, published as `store.save` does."""
    root = checkpoints_folder(run.training)
    target = step_folder(root, step)
    partial = partial_folder(target)
    fill(partial, run, step, optimizer)
    publish(partial, target)
    write_text(root / LATEST_FILE, target.name + "\n")
    return target


def found_step(run: RunConfig) -> int | None:
    found = find_checkpoint(run.training)
    return None if found is None else found.manifest.step


def test_manifest_survives_the_disk(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    found = open_checkpoint(write_checkpoint(run, 20)).manifest
    assert (found.step, found.world_size, found.data, found.broken_media) == (20, 1, DATA, BROKEN)
    assert from_dict(found.config, "checkpoint") == run
    assert found.code_version == code_version()
    assert found.files == {"__0_0.distcp": 20 * len(TENSORS)}
    assert checkpoints_folder(run.training) / "step_00000020" == tmp_path / "checkpoints" / "step_00000020"


def test_resume_choices(tmp_path: Path) -> None:
    assert found_step(run_in(tmp_path)) is None
    assert found_step(run_in(tmp_path, "auto")) is None
    for step in (3, 6):
        write_checkpoint(run_in(tmp_path), step)
    choices: dict[str | int, int] = {"auto": 6, "latest": 6, "3": 3, 3: 3, str(tmp_path): 6}
    for resume, step in choices.items():
        assert found_step(run_in(tmp_path, resume)) == step
    elsewhere = run_in(tmp_path / "other", str(tmp_path / "checkpoints" / "step_00000003"))
    assert found_step(elsewhere) == 3
    assert checkpoint_at(tmp_path).manifest.step == 6


def test_a_step_may_be_given_as_a_number(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("training: {resume: 3}")
    assert load_config([str(tmp_path / "a.yaml")]).training.resume == 3
    assert load_config([str(tmp_path / "a.yaml")], ["training.resume=auto"]).training.resume == "auto"
    for value in ("null", "[1]", "true"):
        with pytest.raises(ConfigError, match=r"training.resume = .*: must be text"):
            load_config([str(tmp_path / "a.yaml")], [f"training.resume={value}"])


def test_errors_name_path_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"'latest': '.*/checkpoints' has no checkpoint; set training.resume=auto"):
        find_checkpoint(run_in(tmp_path, "latest").training)
    write_checkpoint(run_in(tmp_path), 3)
    with pytest.raises(StoreError, match="step_00000005': no such folder; .* has steps 3; give auto, latest, a step"):
        find_checkpoint(run_in(tmp_path, "5").training)
    with pytest.raises(StoreError, match=r"nowhere': no such folder"):
        find_checkpoint(run_in(tmp_path, str(tmp_path / "nowhere")).training)
    with pytest.raises(StoreError, match=r"checkpoints of an earlier run \(.* steps 3\); set training.resume=auto"):
        find_checkpoint(run_in(tmp_path).training)


@pytest.mark.parametrize("damage", ["truncated", "deleted", "no manifest", "torn manifest", "other manifest"])
def test_damage_is_named_and_auto_takes_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(run_in(tmp_path), 3)
    folder = write_checkpoint(run_in(tmp_path), 6)
    expected = {
        "truncated": "__0_0.distcp has 41 bytes, expected 42 bytes; restore the file",
        "deleted": "__0_0.distcp is missing, expected 42 bytes",
        "no manifest": "has no checkpoint.json, so it was never finished",
        "torn manifest": "cannot be read",
        "other manifest": "checkpoint.json has another digest than when it was written",
    }[damage]
    if damage == "truncated":
        (folder / "__0_0.distcp").write_bytes((TENSORS * 6)[:-1])
    elif damage == "deleted":
        (folder / "__0_0.distcp").unlink()
    elif damage == "no manifest":
        (folder / MANIFEST_FILE).unlink()
    elif damage == "torn manifest":
        (folder / MANIFEST_FILE).write_text((folder / MANIFEST_FILE).read_text()[:-20])
    else:
        text = (folder / MANIFEST_FILE).read_text()
        (folder / MANIFEST_FILE).write_text(text.replace('"hidden_size": 2', '"hidden_size": 3'))
        assert (folder / MANIFEST_FILE).read_text() != text
    with pytest.raises(StoreError, match="step_00000006.*" + expected):
        find_checkpoint(run_in(tmp_path, "6").training)
    assert found_step(run_in(tmp_path, "auto")) == 3
    assert expected in caplog.text and "going on from" in caplog.text
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000003")
    with pytest.raises(StoreError, match="no other checkpoint in .* is complete"):
        find_checkpoint(run_in(tmp_path, "auto").training)


@pytest.mark.parametrize("pointer", [b"", b"step_0000000\xff", b"../../elsewhere"])
def test_a_damaged_pointer_is_passed_over(tmp_path: Path, pointer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(run_in(tmp_path), 3)
    (tmp_path / "checkpoints" / "latest").write_bytes(pointer)
    assert found_step(run_in(tmp_path, "auto")) == 3 and "latest' names no step; going on from" in caplog.text
    assert checkpoint_at(tmp_path).manifest.step == 3
    (tmp_path / "checkpoints" / "latest").unlink()
    assert checkpoint_at(tmp_path).manifest.step == 3


def test_a_save_killed_at_any_point_leaves_a_checkpoint_and_can_be_repeated(tmp_path: Path) -> None:
    """What a kill leaves after each step of saving 6 beside 3, and of replacing 6."""
    run = run_in(tmp_path)
    root = checkpoints_folder(run.training)
    write_checkpoint(run, 3)
    partial = partial_folder(step_folder(root, 6))
    (partial / "__0_0.distcp").write_bytes(b"torn")
    assert found_step(run_in(tmp_path, "auto")) == 3
    fill(partial, run, 6)  # complete, not yet renamed
    assert found_step(run_in(tmp_path, "auto")) == 3
    publish(partial, step_folder(root, 6))  # `latest` not yet written
    assert found_step(run_in(tmp_path, "auto")) == 3
    write_checkpoint(run, 6)
    assert found_step(run_in(tmp_path, "auto")) == 6
    partial = partial_folder(step_folder(root, 6))  # saved once more, after going back to 3
    step_folder(root, 6).rename(root / ".step_00000006.replaced")
    assert found_step(run_in(tmp_path, "auto")) == 6
    fill(partial, run, 6)
    shutil.rmtree(root / ".step_00000006.replaced")
    assert found_step(run_in(tmp_path, "auto")) == 6
    write_checkpoint(run, 6)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000003", "step_00000006"]


def test_another_run_is_refused_with_everything_that_differs(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    found = open_checkpoint(write_checkpoint(run, 3))
    check_resumable(found, run, DATA)
    model = ModelConfig(num_layers=2, hidden_size=64, attention_backend="dense")
    training = replace(run.training, seed=1, precision="float32")
    with pytest.raises(StoreError) as caught:
        check_resumable(found, replace(run, model=model, training=training), DataIdentity("u" * 64, "f" * 16))
    for part in (
        "model.num_layers: 36 -> 2; model.hidden_size: 2048 -> 64",
        "training.seed: 1234 -> 1; training.precision: 'bf16' -> 'float32'",
        "data.tokenizer: another tokenizer",
        "data.pack_index: another pack index (hash 0123456789abcdef -> ffffffffffffffff)",
        "use the checkpoint's settings",
    ):
        assert part in str(caught.value)
    assert "attention_backend" not in str(caught.value) and "export-lance" not in str(caught.value)


WIDER: dict[str, dict[str, int]] = {
    "dp": {},
    "cp": {"context_parallel_size": 2},
    "tp": {"tensor_model_parallel_size": 2},
    "pp": {"pipeline_model_parallel_size": 2},
    "vpp": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "uneven stages": {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 8},
}


def table_of_kinds() -> list[tuple[str, str, bool]]:
    """(kind, what changes, whether it loads) of the README's table."""
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| optimizer's state |"))
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start : start + 5])
    assert [row[0].strip("`") for row in rows] == [DP_RESHARDABLE, FULLY_RESHARDABLE, PER_PARAMETER]
    return [(row[0].strip("`"), change, row[i] == "yes") for row in rows for i, change in enumerate(head) if i]


@pytest.mark.parametrize(("kind", "change", "loads"), table_of_kinds())
def test_the_table_of_kinds_of_an_optimizers_state(tmp_path: Path, kind: str, change: str, loads: bool) -> None:
    plain = ParallelConfig(use_distributed_optimizer=kind != PER_PARAMETER)
    run = replace(run_in(tmp_path), parallel=plain)
    found = open_checkpoint(write_checkpoint(run, 3, kind))
    changed = replace(run, parallel=replace(plain, **WIDER[change]))  # type: ignore[arg-type]
    if loads:
        check_resumable(found, changed, DATA)
        return
    remedy = (
        f"the optimizer's state, {DP_RESHARDABLE}, loads on other dp and cp sizes only: to change the rest, write it "
        "again on its own layout with training.resume=3 training.train_iters=3 "
        f"training.save_format={FULLY_RESHARDABLE}"
    )
    with pytest.raises(StoreError) as caught:
        check_resumable(found, changed, DATA)
    differing = [f"parallel.{name}: {getattr(plain, name)} -> {value}" for name, value in WIDER[change].items()]
    assert all(part in str(caught.value) for part in [*differing, remedy])


def test_the_distributed_optimizer_and_the_plain_one_do_not_read_one_another(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    found = open_checkpoint(write_checkpoint(run, 3, FULLY_RESHARDABLE))
    with pytest.raises(StoreError, match="use_distributed_optimizer: True -> False"):
        check_resumable(found, replace(run, parallel=ParallelConfig(use_distributed_optimizer=False)), DATA)


def test_changed_settings_are_told(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    found = open_checkpoint(write_checkpoint(run, 3))
    now = replace(run, optimizer=replace(run.optimizer, lr=5e-5), training=replace(run.training, resume="auto"))
    assert changed_settings(found, now) == ["optimizer.lr: 0.0001 -> 5e-05"]


def test_another_format_is_refused_and_an_older_configuration_read(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    folder = write_checkpoint(run, 3)
    values = json.loads((folder / MANIFEST_FILE).read_text())
    del values["config"]["training"]["progress"]
    text = json.dumps(values)
    (folder / MANIFEST_FILE).write_text(text)
    write_digests(folder, {**read_digests(folder), MANIFEST_FILE: text_digest(text)})
    old = open_checkpoint(folder)
    check_resumable(old, run, DATA)
    assert from_dict(old.manifest.config, "checkpoint") == run
    (folder / MANIFEST_FILE).write_text(json.dumps({**values, "format": 1}))
    with pytest.raises(StoreError, match="has format 1, this program reads 2; use version .*, which wrote it"):
        open_checkpoint(folder)


def test_from_dict_checks_what_it_reads() -> None:
    values = to_dict(RunConfig())
    values["model"]["num_layer"] = 3
    with pytest.raises(ConfigError, match=r"checkpoint: model.num_layer: unknown key; did you mean model.num_layers"):
        from_dict(values, "checkpoint")
