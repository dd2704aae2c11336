"""examples/torchrun: the script trains, and run again it goes on; SLURM's is checked by tests/slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lance.training.events import read_events
from tests.shared import REPOSITORY
from tests.tiny import TinyRun

pytestmark = pytest.mark.distributed


def launch(script: str, tiny: TinyRun, run_dir: Path, steps: int, **variables: str) -> str:
    """Run a script on two ranks; returns what they say."""
    settings = [f"training.run_dir={run_dir}", f"training.train_iters={steps}"]
    done = subprocess.run(
        ["bash", f"examples/torchrun/{script}", str(tiny.config), *settings],
        cwd=REPOSITORY,
        env={**os.environ, "RANKS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_script_that_is_run_again_goes_on(tiny_run: TinyRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launch("one_node.sh", tiny_run, run_dir, 2)
    nodes = {"NODES": "1", "FIRST_NODE": "localhost", "PORT": "0"}
    output = launch("many_nodes.sh", tiny_run, run_dir, 3, **nodes)
    assert "going on from" in output
    starts = [event["step"] for event in read_events(run_dir) if event["event"] == "started"]
    assert starts == [0, 2]
    assert len((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3
