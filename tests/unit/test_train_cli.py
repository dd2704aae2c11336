"""The training entry's command line: --print-config, --dry-run, exit codes."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_lance.checkpoint.manifest import checkpoint_at
from megatron_lance.config.errors import ExitCode, UserError
from megatron_lance.config.loader import load_config
from megatron_lance.config.validate import validate
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.packing.layout import Layout
from megatron_lance.profiling.memory import memory_per_rank
from megatron_lance.training import train
from tests.command import Commander
from tests.shared import REPOSITORY
from tests.tiny import TinyRun

EXAMPLES = sorted((REPOSITORY / "examples" / "configs").glob("**/*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_print_config_of_every_example_round_trips(path: Path, command: Commander, tmp_path: Path) -> None:
    p = load_config([str(path)]).parallel
    degrees = p.tensor_model_parallel_size, p.context_parallel_size, p.pipeline_model_parallel_size
    world = f"--world-size {math.prod(degrees)}"  # the smallest
    printed = command(f"train --config {path} --print-config {world} training.train_iters=7000 data.sources='[]'")
    assert (printed.code, printed.err) == (0, "")
    copy = tmp_path / "copy.yaml"
    copy.write_text(printed.out, encoding="utf-8")
    resolved = load_config([str(path)], ["training.train_iters=7000", "data.sources=[]"])
    assert load_config([str(copy)]) == resolved
    assert command(f"train --config {copy} --print-config {world}").out == printed.out


def test_a_world_size_is_only_described(command: Commander, tiny_run: TinyRun) -> None:
    wide = f"train --config {tiny_run.config} parallel.tensor_model_parallel_size=2"
    described = command(f"{wide} --dry-run --world-size 4")
    assert described.code == 0 and "each tp rank" in described.out, described.err
    refused = command(f"{wide} --world-size 4")
    assert refused.code == 2 and "--world-size: describes a run; add --dry-run or --print-config" in refused.err


def test_without_torchrun_one_replica_is_described(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = ["--config", str(tiny_run.config), "parallel.tensor_model_parallel_size=2", "--dry-run"]
    monkeypatch.chdir(tiny_run.folder)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert train.main(wide) == 0
    assert "on cp 1 x tp 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="world size is 0"):
        train.main([*wide, "--world-size", "0"])
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="world size is 1"):
        train.main(wide)


def test_later_files_and_overrides_win_in_print_config(command: Commander, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("optimizer: {lr: 5e-4, clip_grad: 0.5}\n", encoding="utf-8")
    line = f"train --config {tiny_run.config} --config more.yaml optimizer.lr=2e-4 --print-config training.seed=9"
    (tmp_path / "out.yaml").write_text(command(line, folder=tmp_path).out, encoding="utf-8")
    config = load_config([str(tmp_path / "out.yaml")])
    assert (config.optimizer.lr, config.optimizer.clip_grad, config.training.seed) == (2e-4, 0.5, 9)
    assert config.data == tiny_run.load().data


def test_only_the_first_rank_prints(command: Commander, tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    first = command(f"train --config {tiny_run.config} --print-config", ranks=2)
    second = command(f"train --config {tiny_run.config} --print-config", ranks=2, rank=1)
    assert first.out and not second.out
    assert first.code == second.code == 0
    wrong = command(f"train --config {tiny_run.config} training.train_iters=0", ranks=2, rank=1)
    assert (wrong.code, wrong.err) == (2, "")


@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [
        (1, "parallel.offload_layers=2"),
        (8, "parallel.tensor_model_parallel_size=2 parallel.pipeline_model_parallel_size=2"),
    ],
)
def test_dry_run_tells_memory_layout_and_first_pack(
    command: Commander, tiny_run: TinyRun, ranks: int, degrees: str
) -> None:
    done = command(f"train --config {tiny_run.config} --dry-run {degrees}", ranks=ranks)
    assert done.code == 0, done.err
    assert not dist.is_initialized()
    run = tiny_run.load(*degrees.split())
    validate(run, ranks)
    for memory in memory_per_rank(run, ranks):
        assert memory.line() in done.out
    planned = PackIndex.open(run.data.pack_index).pack(0)
    assert str(planned) in done.out
    parallel = run.parallel
    degrees_of_layout = (parallel.context_parallel_size, parallel.tensor_model_parallel_size)
    layout = Layout.build(planned.pack, *degrees_of_layout, parallel.region_alignment)
    assert all(line in done.out for line in layout.describe().splitlines())
    picture = done.out[done.out.index("attention of pack 0") :].splitlines()[1:]
    assert picture and all(set(line.strip()) <= set("#+.") for line in picture)


def test_dry_run_leaves_nothing_behind(command: Commander, tiny_run: TinyRun, tmp_path: Path) -> None:
    assert command(f"train --config {tiny_run.config} --dry-run training.run_dir=run", folder=tmp_path).code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_ends_with_0_and_leaves_its_configuration(command: Commander, tiny_run: TinyRun, tmp_path: Path) -> None:
    overrides = ["training.train_iters=1", "training.run_dir=run", "model.rope_inv_freq_dtype=float32"]
    overrides.append("parallel.offload_layers=1")
    done = command(f"train --config {tiny_run.config} {' '.join(overrides)}", folder=tmp_path)
    assert done.code == 0, done.err
    assert "step 1/1 loss" in done.err
    assert "first layers of each model chunk that wait on the host: 1, about " in done.err
    assert load_config([str(tmp_path / "run" / "config.yaml")]) == tiny_run.load(*overrides)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_usage_errors(command: Commander) -> None:
    for line, message in (
        ("train", "the following arguments are required: --config"),
        ("train --config", "expected one argument"),
        ("train --config a.yaml --gpus 8", "unrecognized arguments: --gpus"),
    ):
        done = command(line)
        assert done.code == 2
        assert message in done.err


def test_a_signal_while_a_run_starts_is_remembered(tiny_run: TinyRun, tmp_path: Path) -> None:
    """It comes before torch is imported, let alone a step done; the run still saves, and ends with the code of it."""
    settings = [f"training.run_dir={tmp_path / 'run'}", "training.train_iters=9"]
    command = [sys.executable, "-W", "ignore", "-m", "megatron_lance.training.train", "--config", str(tiny_run.config)]
    run = subprocess.Popen([*command, *settings], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{run.pid}/status")
    caught = 1 << (signal.SIGTERM - 1)
    while run.poll() is None and not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) & caught:
        time.sleep(0.01)
    run.terminate()
    _, said = run.communicate(timeout=200)
    assert run.returncode == ExitCode.STOPPED, said
    assert "stopped by SIGTERM after step 1 of 9, which is saved" in said
    assert checkpoint_at(tmp_path / "run").manifest.step == 1
