"""examples/torchrun: the script trains, and run again it goes on; SLURM's is checked by tests/slurm."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lance.checkpoint.manifest import checkpoint_at
from megatron_lance.training.events import read_events
from tests.shared import REPOSITORY
from tests.tiny import TinyRun

pytestmark = pytest.mark.distributed


def launch(
    script: str, tiny: TinyRun, run_dir: Path, steps: int, *more: str, exit_code: int = 0, **variables: str
) -> str:
    """Run a script on two ranks; returns what they say."""
    settings = [f"training.run_dir={run_dir}", f"training.train_iters={steps}", *more]
    done = subprocess.run(
        ["bash", f"examples/torchrun/{script}", str(tiny.config), *settings],
        cwd=REPOSITORY,
        env={**os.environ, "RANKS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    return done.stderr


def test_a_script_that_is_run_again_goes_on(tiny_run: TinyRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launch("one_node.sh", tiny_run, run_dir, 2)
    output = launch("many_nodes.sh", tiny_run, run_dir, 3, NODES="1", FIRST_NODE="localhost", PORT="0")
    assert "going on from" in output
    starts = [event["step"] for event in read_events(run_dir) if event["event"] == "started"]
    assert starts == [0, 2]
    assert len((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_a_run_that_was_stopped_is_not_started_again(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Its code comes out of the script, although torchrun has none."""
    launch("one_node.sh", tiny_run, tmp_path / "run", 3, "training.stop_after_minutes=1e-9", exit_code=6)
    events = [event["event"] for event in read_events(tmp_path / "run")]
    assert events == ["started", "checkpoint", "ended"]


def test_sigterm_to_a_script_saves(tiny_run: TinyRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = [f"training.run_dir={run_dir}", "training.train_iters=100000"]
    script = subprocess.Popen(
        ["bash", "examples/torchrun/one_node.sh", str(tiny_run.config), *settings],
        cwd=REPOSITORY,
        env={**os.environ, "RANKS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run_dir / "metrics.jsonl"
    while script.poll() is None and not (metrics.is_file() and metrics.read_text(encoding="utf-8")):
        time.sleep(0.2)
    script.terminate()
    _, said = script.communicate(timeout=200)
    assert script.returncode == 6, said
    *_, ended = read_events(run_dir)
    assert ended["exit_code"] == 6 and "SIGTERM" in ended["message"]
    assert checkpoint_at(run_dir).manifest.step == ended["step"] > 0
