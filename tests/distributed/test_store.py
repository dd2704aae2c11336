"""Checkpoints in trouble on two ranks: a full disk, a folder that cannot be written, a flipped bit.

Each time every rank says the same one thing, and the checkpoint before is as it was and is used.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_lance.checkpoint.digests import DIGESTS_FILE, read_digests
from megatron_lance.checkpoint.manifest import check_digests, checkpoint_at, open_checkpoint
from tests.distributed.launch import on_ranks
from tests.distributed.stored import assert_equal_tensors, stored_tensors
from tests.shared import REPOSITORY
from tests.tiny import TinyRun

pytestmark = pytest.mark.distributed

TP2 = "parallel.tensor_model_parallel_size=2"
BEHIND = "training.async_save=true"
LIMIT = 100_000  # bytes; tensors of a rank need more, everything else less


class Trouble:
    """Runs below one folder, and what each rank said of them."""

    def __init__(self, folder: Path, tiny: TinyRun) -> None:
        self.folder, self.tiny = folder, tiny
        self.jobs: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        *settings: str,
        flip: str = "",
        limit: int = 0,
        free: int = -1,
        hold: int = 0,
        sees: int = 0,
        kill: bool = False,
    ) -> None:
        overrides = [TP2, f"training.run_dir={self.folder / name}", *settings]
        trouble = {"flip": flip and str(self.folder / flip), "limit": limit or None, "free": None if free < 0 else free}
        self.jobs.append({"config": str(self.tiny.config), "overrides": overrides, **trouble})
        self.jobs[-1] |= {"hold": hold or None, "sees": sees or None, "kill": kill}

    def run(self) -> None:
        plan = self.folder / "jobs.json"
        plan.write_text(json.dumps(self.jobs), encoding="utf-8")
        on_ranks(2, str(REPOSITORY / "tests" / "distributed" / "run_store.py"), str(plan))
        self.jobs = []

    def said(self, name: str) -> list[str]:
        return [(self.folder / f"{name}_outcome" / f"{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]

    def steps(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.folder / name / "checkpoints").iterdir())

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system that has room for one checkpoint but not for two; None where none can be mounted."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def trouble(tmp_path_factory: pytest.TempPathFactory, tiny_run: TinyRun, small_disk: Path | None) -> Trouble:
    found = Trouble(tmp_path_factory.mktemp("trouble"), tiny_run)
    found.add("good", "training.train_iters=3", "training.save_interval=1")
    found.run()
    if small_disk is not None:
        (found.folder / "small").symlink_to(small_disk)
    for name in ("torn", "torn_behind", "full", "killed", "killed_behind", "astray", "flipped", "asked"):
        shutil.copytree(found.folder / "good" / "checkpoints", found.folder / name / "checkpoints")
        shutil.rmtree(found.folder / name / "checkpoints" / "step_00000003")
        (found.folder / name / "checkpoints" / "latest").write_text("step_00000002\n", encoding="utf-8")
    if small_disk is not None:
        kept = small_disk / "checkpoints" / "step_00000002"
        shutil.copytree(found.folder / "good" / "checkpoints" / "step_00000002", kept)
        (kept.parent / "latest").write_text("step_00000002\n", encoding="utf-8")
        found.add("small", "training.train_iters=3", "training.resume=auto")
    (found.folder / "blocked").mkdir()
    (found.folder / "blocked" / "checkpoints").write_text("a file")
    auto = ("training.train_iters=3", "training.resume=auto")
    found.add("torn", *auto, limit=LIMIT)
    found.add("torn_behind", *auto, BEHIND, limit=LIMIT)
    found.add("full", *auto, free=10_000)
    found.add("killed", *auto, kill=True)
    found.add("killed_behind", *auto, BEHIND, kill=True)
    found.add("astray", *auto, sees=1)
    found.add("behind", "training.train_iters=3", "training.save_interval=2", BEHIND, hold=3)
    found.add("blocked", "training.train_iters=1")
    found.add("flipped", *auto, flip="flipped/checkpoints/step_00000002/__1_0.distcp")
    found.add("asked", "training.resume=2", flip="asked/checkpoints/step_00000002/__0_1.distcp")
    found.add(
        "kept", "training.train_iters=3", "training.save_interval=1", "training.keep_last=1", "training.keep_every=2"
    )
    found.run()
    return found


def test_each_rank_wrote_down_the_digests_of_its_files(trouble: Trouble) -> None:
    checkpoint = checkpoint_at(trouble.folder / "good")
    check_digests(checkpoint)
    names = set(read_digests(checkpoint.folder))
    assert {name.split("_")[2] for name in names if name.startswith("__")} == {"0", "1"}
    assert names == {path.name for path in checkpoint.folder.iterdir()} - {DIGESTS_FILE}


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("torn", r"Worker failure: .* \([0-9]+ bytes are free there\)"),
        ("torn_behind", r"Worker failure: .* \([0-9]+ bytes are free there\)"),
        ("full", "No space left on device: [0-9]+ bytes are needed, 10000 are free"),
        ("killed", "writer of it ended"),
        ("killed_behind", "writer of it ended"),
        ("blocked", "(Not a directory|File exists)"),
    ],
)
def test_a_save_that_fails_is_one_error_and_harms_nothing(trouble: Trouble, name: str, cause: str) -> None:
    said = trouble.said(name)
    step = 1 if name == "blocked" else 3
    start = rf"ERROR checkpoint '.*/{name}/checkpoints/step_0000000{step}': cannot be written: "
    end = r"; make room or correct training.run_dir; the checkpoints before it are as they were\Z"
    assert re.search(rf"{start}.*{cause}.*{end}", said[0], re.DOTALL), said[0]
    assert re.search(rf"{start}.*{end}", said[1], re.DOTALL), said[1]
    if name != "blocked":
        assert trouble.steps(name) == ["latest", "step_00000001", "step_00000002"]
        checkpoint = checkpoint_at(trouble.folder / name)
        check_digests(checkpoint)
        assert checkpoint.manifest.step == 2


def test_a_small_disk_keeps_the_checkpoint_that_fits(trouble: Trouble, small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("mounting a small file system needs rights that this process has not")
    for said in trouble.said("small"):
        assert re.search(
            r"cannot be written: .*No space left on device: [0-9]+ bytes are needed, [0-9]+ are free", said
        )
    assert trouble.steps("small") == ["latest", "step_00000002"]
    check_digests(checkpoint_at(small_disk))


def test_all_ranks_go_on_from_the_checkpoint_that_the_first_found(trouble: Trouble) -> None:
    """A shared disk may show another machine an older state."""
    assert trouble.losses("astray") == trouble.losses("good")[2:]


def test_training_goes_on_while_a_save_is_under_way(trouble: Trouble) -> None:
    said = trouble.said("behind")[0]
    assert "the save of step 3 waits for that of step 2" in said  # whose files were hashed only after step 3
    assert re.search(r"saved .*/step_00000002 in [0-9.]+ s, of which training waited [0-9.]+ s", said)
    assert trouble.losses("behind") == trouble.losses("good")
    assert trouble.steps("behind") == ["latest", "step_00000002", "step_00000003"]
    for step in (2, 3):
        behind, good = (trouble.folder / name / "checkpoints" / f"step_0000000{step}" for name in ("behind", "good"))
        check_digests(open_checkpoint(behind))
        assert_equal_tensors(stored_tensors(behind), stored_tensors(good))


def test_metrics_say_what_saves_cost(trouble: Trouble) -> None:
    lines = (trouble.folder / "good" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    costs = [(line["save_stall_seconds"], line["save_seconds"]) for line in map(json.loads, lines)]
    assert costs[0] == (0, 0)
    assert all(stall >= seconds > 0 for stall, seconds in costs[1:])


def test_auto_passes_over_a_flipped_bit_and_repeats_what_was_lost(trouble: Trouble) -> None:
    said = trouble.said("flipped")[0]
    assert "step_00000002': is damaged, __1_0.distcp has another sha256 than when it was written" in said
    assert "is damaged; going on from" in said and "ERROR" not in said
    assert trouble.losses("flipped") == trouble.losses("good")[1:]
    assert open_checkpoint(trouble.folder / "flipped" / "checkpoints" / "step_00000003").manifest.step == 3


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(trouble: Trouble) -> None:
    for said in trouble.said("asked"):
        assert "ERROR checkpoint" in said
        assert "is damaged, __0_1.distcp has another sha256 than when it was written; restore the file" in said
    assert not (trouble.folder / "asked" / "metrics.jsonl").exists()


def test_retention(trouble: Trouble) -> None:
    assert trouble.steps("kept") == ["latest", "step_00000002", "step_00000003"]
