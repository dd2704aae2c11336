"""Save, a new process, resume: the same numbers bit for bit on every layout; weights and exports across layouts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_lance.checkpoint.hf_export import export_lance
from megatron_lance.checkpoint.hf_lance import POSITION_KEY
from megatron_lance.checkpoint.manifest import checkpoint_at, find_checkpoint
from megatron_lance.checkpoint.public_files import WEIGHTS_FILE
from tests.distributed.launch import on_ranks
from tests.distributed.stored import assert_equal_tensors, stored_tensors
from tests.shared import REPOSITORY
from tests.tiny import TinyRun

pytestmark = pytest.mark.distributed

TP2, PP2, CP2 = (f"parallel.{name}_parallel_size=2" for name in ("tensor_model", "pipeline_model", "context"))
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
PLAIN = "parallel.use_distributed_optimizer=false"
BF16 = "training.precision=bf16"
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, [TP2, "training.async_save=true", "training.ema_decay=0.9"]),
    "pp2": (2, [PP2]),
    "pp2_vpp2_plain": (2, [PP2, VPP2, PLAIN]),
    "dp2": (2, []),
    "dp2_bf16": (2, [BF16, *OVERLAP, "training.ema_decay=0.9"]),
}
# Another run than the one that wrote the checkpoint: name -> ranks, layout, run that wrote it.
OTHERS = {
    "one_on_cp2": (2, [CP2], "one"),
    "dp2_on_one": (1, [], "dp2"),
    "tp2_on_pp2": (2, [PP2], "tp2"),
}
# Model weights of a run's last checkpoint under some layout: name -> ranks, layout, run.
WEIGHTS = {
    "tp2_own": (2, [TP2], "tp2"),
    "tp2_on_one": (1, [], "tp2"),
    "pp2_own": (2, [PP2], "pp2"),
    "pp2_on_tp2": (2, [TP2], "pp2"),
    "dp2_bf16_own": (2, [BF16], "dp2_bf16"),
}
EXPORTS = ("tp2", "pp2", "dp2_bf16")
SCHEDULE = ["optimizer.lr_decay_style=cosine", "optimizer.lr_warmup_iters=2", "optimizer.lr_decay_iters=8"]
KINDS = ("straight", "half")
EXACT = (
    *("loss", "ce_loss", "velocity_loss", "grad_norm", "learning_rate", "fill"),
    *("loss_by_source", "grad_norm_by_expert", "tokens_seen"),
)


@dataclass(frozen=True)
class Runs:
    """Runs of all layouts below one folder: straight (6 steps), half (4 steps, then resumed after the third)."""

    folder: Path
    tiny: TinyRun

    def run_dir(self, kind: str, name: str) -> Path:
        return self.folder / kind / name

    def job(self, kind: str, name: str, layout: list[str], *settings: str, weights: str = "") -> dict[str, Any]:
        run_dir = f"training.run_dir={self.run_dir(kind, name)}"
        overrides = [*SCHEDULE, "optimizer.weight_decay=0.1", run_dir, *layout, *settings]
        return {"config": str(self.tiny.config), "overrides": overrides, "weights": weights}

    def do(self, ranks: int, jobs: list[dict[str, Any]]) -> None:
        """One new process per rank for all jobs."""
        plan = self.folder / "jobs.json"
        plan.write_text(json.dumps(jobs), encoding="utf-8")
        on_ranks(ranks, str(REPOSITORY / "tests" / "distributed" / "run_resume.py"), str(plan))

    def metrics(self, kind: str, name: str) -> list[dict[str, Any]]:
        lines = (self.run_dir(kind, name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def first_jobs(runs: Runs, ranks: int) -> list[dict[str, Any]]:
    jobs = []
    for name, layout in ((n, at) for n, (r, at) in LAYOUTS.items() if r == ranks):
        jobs.append(runs.job("straight", name, layout, "training.train_iters=6"))
        jobs.append(runs.job("half", name, layout, "training.train_iters=4", "training.save_interval=3"))
    return jobs


def later_jobs(runs: Runs, ranks: int) -> list[dict[str, Any]]:
    """Resume, on the same layouts and on others; then read weights."""
    six = "training.train_iters=6"
    jobs = []
    for name, layout in ((n, at) for n, (r, at) in LAYOUTS.items() if r == ranks):
        keep = f"training.keep_last={2 if name == 'one' else 0}"
        jobs.append(runs.job("half", name, layout, six, "training.resume=3", keep))
    for name, layout, source in ((n, at, s) for n, (r, at, s) in OTHERS.items() if r == ranks):
        checkpoint = runs.run_dir("straight_3", source) / "step_00000003"
        jobs.append(runs.job("other", name, layout, six, f"training.resume={checkpoint}"))
    for name, layout, source in ((n, at, s) for n, (r, at, s) in WEIGHTS.items() if r == ranks):
        weights = str(runs.folder / f"{name}.safetensors")
        jobs.append(runs.job("straight", source, layout, weights=weights))
    return jobs


def export_jobs(runs: Runs) -> list[dict[str, Any]]:
    """Read the exports back on one rank, and start a run from one."""
    jobs = []
    for name in EXPORTS:
        source = f"training.init_from={runs.folder / f'export_{name}'}"
        weights = str(runs.folder / f"{name}_back.safetensors")
        jobs.append(runs.job("back", name, [BF16] if "bf16" in name else [], source, weights=weights))
    source = f"training.init_from={runs.folder / 'export_pp2'}"
    return [*jobs, runs.job("back", "trained", [], source, "training.train_iters=1", *SCHEDULE[:1])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_run: TinyRun) -> Runs:
    found = Runs(tmp_path_factory.mktemp("resume"), tiny_run)
    for ranks in (1, 2):
        found.do(ranks, first_jobs(found, ranks))
    for name in LAYOUTS:  # what a process killed in the middle of a save leaves
        partial = found.run_dir("half", name) / "checkpoints" / ".step_00000006.partial"
        partial.mkdir()
        (partial / "__0_0.distcp").write_bytes(b"torn")
    for source in {source for *_, source in OTHERS.values()}:
        copy = found.run_dir("straight_3", source)
        copy.parent.mkdir(exist_ok=True)
        copy.symlink_to(found.run_dir("half", source) / "checkpoints")
    found.do(2, later_jobs(found, 2))
    for name in EXPORTS:
        export_lance(checkpoint_at(found.run_dir("straight", name)), found.folder / f"export_{name}")
    found.do(1, [*later_jobs(found, 1), *export_jobs(found)])
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(runs: Runs, name: str) -> None:
    straight, half = (runs.metrics(kind, name) for kind in ("straight", "half"))
    assert [line["step"] for line in half] == [1, 2, 3, 4, 5, 6]
    for before, after in zip(straight, half, strict=True):
        assert {key: after[key] for key in EXACT} == {key: before[key] for key in EXACT}, f"step {before['step']}"
    assert len({line["grad_norm"] for line in half}) == 6
    weights = [checkpoint_at(runs.run_dir(kind, name)) for kind in ("straight", "half")]
    assert [found.manifest.step for found in weights] == [6, 6]


@pytest.mark.parametrize("name", ["tp2", "dp2_bf16"])
def test_so_do_averaged_weights(runs: Runs, name: str) -> None:
    straight, half = (stored_tensors(checkpoint_at(runs.run_dir(kind, name)).folder, "ema.") for kind in KINDS)
    assert_equal_tensors(half, straight)
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}


def test_retention_keeps_the_newest(runs: Runs) -> None:
    names = {path.name for path in (runs.run_dir("half", "one") / "checkpoints").iterdir()}
    assert names == {"latest", "step_00000004", "step_00000006"}


@pytest.mark.parametrize("name", ["one_on_cp2", "dp2_on_one"])
def test_the_optimizer_loads_on_other_dp_and_cp_sizes(runs: Runs, name: str) -> None:
    straight = runs.metrics("straight", OTHERS[name][2])[3:]
    for before, after in zip(straight, runs.metrics("other", name), strict=True):
        for key in ("loss", "ce_loss", "velocity_loss", "grad_norm"):
            assert after[key] == pytest.approx(before[key], rel=1e-5), f"{key} of step {before['step']}"
        assert after["learning_rate"] == before["learning_rate"]


def test_another_tensor_or_pipeline_layout_is_refused(runs: Runs) -> None:
    error = (runs.run_dir("other", "tp2_on_pp2") / "error.txt").read_text(encoding="utf-8")
    for part in (
        "parallel.tensor_model_parallel_size: 2 -> 1; parallel.pipeline_model_parallel_size: 1 -> 2",
        "the optimizer's state, dp_reshardable, loads on other dp and cp sizes only",
        "with training.resume=3 training.train_iters=3 training.save_format=fully_reshardable "
        "optimizer.lr_warmup_iters=0 and go on from that",
        "start from its weights by training.init_from",
    ):
        assert part in error
    assert not (runs.run_dir("other", "tp2_on_pp2") / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["tp2_on_one", "pp2_on_tp2"])
def test_model_weights_load_on_any_layout(runs: Runs, name: str) -> None:
    own = load_file(runs.folder / f"{WEIGHTS[name][2]}_own.safetensors")
    assert_equal_tensors(load_file(runs.folder / f"{name}.safetensors"), own)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_and_what_is_loaded_from_it_are_equal_bit_for_bit(runs: Runs, name: str) -> None:
    own = load_file(runs.folder / f"{name}_own.safetensors")
    exported = load_file(runs.folder / f"export_{name}" / WEIGHTS_FILE)
    del exported[POSITION_KEY]
    assert_equal_tensors(exported, own)
    assert_equal_tensors(load_file(runs.folder / f"{name}_back.safetensors"), own)


def test_a_run_starts_from_an_export(runs: Runs) -> None:
    assert runs.metrics("back", "trained")[0]["loss"] < 0.95 * runs.metrics("straight", "pp2")[0]["loss"]


def test_a_damaged_checkpoint_is_passed_over(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = runs.run_dir("half", "tp2")
    damaged = checkpoint_at(run_dir)
    file = max(damaged.folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    run = runs.tiny.load(f"training.run_dir={run_dir}", "training.resume=auto")
    found = find_checkpoint(run.training)
    assert found is not None and found.manifest.step == 4
    assert f"is incomplete, {file.name} has" in caplog.text and "going on from" in caplog.text
