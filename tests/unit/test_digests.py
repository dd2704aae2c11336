"""Digests of a checkpoint's files, and which checkpoints are kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_lance.checkpoint.digests import DIGESTS_FILE, damaged, digests_of, files_in, written_by
from megatron_lance.checkpoint.manifest import (
    MANIFEST_FILE,
    DataIdentity,
    Manifest,
    StoreError,
    check_digests,
    find_checkpoint,
    names_checkpoint,
    open_checkpoint,
)
from megatron_lance.checkpoint.retention import expired
from megatron_lance.config.schema import RunConfig, TrainingConfig

FILES = {"__0_0.distcp": b"first", "__0_1.distcp": b"second", "__11_0.distcp": b"third", ".metadata": b"m"}


def write(folder: Path, step: int = 3) -> Path:
    """A checkpoint without tensors that megatron-core could read."""
    (folder / "vit").mkdir(parents=True)
    for name, content in {**FILES, "common.pt": b"c", "vit/vit.safetensors": b"v"}.items():
        (folder / name).write_bytes(content)
    run = RunConfig(training=TrainingConfig(run_dir=str(folder.parent.parent)))
    manifest = Manifest.of(folder, run, step, 12, DataIdentity("t", "p"), {})
    manifest.write(folder, digests_of(folder, files_in(folder)))
    return folder


def test_every_file_but_the_list_has_a_digest(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    content = json.loads((folder / DIGESTS_FILE).read_text())
    assert content["algorithm"] == "sha256"
    assert set(content["files"]) == {*FILES, "common.pt", "vit/vit.safetensors", MANIFEST_FILE}
    for name, digest in content["files"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest(), name
    check_digests(open_checkpoint(folder))


def test_each_rank_hashes_what_it_wrote(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / DIGESTS_FILE).unlink()
    (folder / MANIFEST_FILE).unlink()
    shares = {rank: written_by(folder, rank) for rank in range(12)}
    assert shares[0] == [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "vit/vit.safetensors"]
    assert shares[11] == ["__11_0.distcp"] and not any(shares[rank] for rank in range(1, 11))


@pytest.mark.parametrize("name", [*FILES, "common.pt", "vit/vit.safetensors", MANIFEST_FILE])
@pytest.mark.parametrize("shares", [1, 2, 20])
def test_a_flipped_bit_is_found_in_one_share_of_the_work(tmp_path: Path, name: str, shares: int) -> None:
    path = write(tmp_path / "a") / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    found = [fault for share in range(shares) for fault in damaged(tmp_path / "a", share, shares)]
    assert found == [f"{name} has another sha256 than when it was written"]


def test_damage_is_one_error_that_names_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoints" / "step_00000003")
    checkpoint = open_checkpoint(folder)
    (folder / "__0_1.distcp").write_bytes(b"sEcond")
    message = (
        r"step_00000003': is damaged, __0_1.distcp has another sha256 .*; restore the file or use another checkpoint"
    )
    with pytest.raises(StoreError, match=message):
        check_digests(checkpoint)
    (folder / "__0_1.distcp").unlink()
    with pytest.raises(StoreError, match=r"__0_1.distcp cannot be read"):
        check_digests(checkpoint)
    for content in ("{", "[]", '{"algorithm": "md5", "files": {}}'):
        (folder / DIGESTS_FILE).write_text(content)
        with pytest.raises(StoreError, match=r"digests.json cannot be read"):
            check_digests(checkpoint)
    (folder / DIGESTS_FILE).unlink()
    with pytest.raises(StoreError, match=r"digests.json cannot be read"):
        check_digests(checkpoint)


def test_auto_passes_over_what_was_found_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "checkpoints"
    folders = [write(root / f"step_0000000{step}", step) for step in (1, 2, 3)]
    (root / "latest").write_text("step_00000003\n")
    training = TrainingConfig(run_dir=str(tmp_path), resume="auto")
    for passed_over, step in ((0, 3), (1, 2), (2, 1)):
        found = find_checkpoint(training, set(folders[3 - passed_over :]))
        assert found is not None and found.manifest.step == step
    assert "step_00000003' is damaged; going on from" in caplog.text
    with pytest.raises(StoreError, match="no other checkpoint in .* is complete"):
        find_checkpoint(training, set(folders))


def test_what_names_a_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path / "run" / "checkpoints" / "step_00000003")
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "model.safetensors").write_bytes(b"")
    assert names_checkpoint(folder) and names_checkpoint(tmp_path / "run")
    assert not names_checkpoint(tmp_path / "public") and not names_checkpoint(tmp_path / "nowhere")


STEPS = [5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [
        (0, 0, []),
        (0, 10, []),
        (2, 0, [5, 10, 15, 20]),
        (2, 10, [5, 15]),
        (1, 15, [5, 10, 20, 25]),
        (6, 0, []),
        (9, 7, []),
    ],
)
def test_retention(keep_last: int, keep_every: int, gone: list[int]) -> None:
    assert expired(STEPS, 30, keep_last, keep_every) == gone


def test_checkpoints_of_later_steps_stay() -> None:
    assert expired(STEPS, 15, 1, 0) == [5, 10]
