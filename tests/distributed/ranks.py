"""Start a program on several gloo ranks, as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.shared import REPOSITORY

TRAIN = ("-m", "megatron_lance.training.train")


def start(ranks: int, *program: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run a program with torchrun, or without a launcher on one rank, always on the CPU and one thread per rank.

    Args:
        ranks: processes.
        program: what stands behind `python` or `torchrun`: a file or `-m` and a module, then arguments.
        timeout: seconds.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks > 1 else ()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *launcher, *program],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def succeed(ranks: int, *program: str) -> subprocess.CompletedProcess[str]:
    """As `start`; fails the calling test with the program's output unless it ends with 0."""
    done = start(ranks, *program)
    assert done.returncode == 0, f"{' '.join(program)} on {ranks} ranks: exit {done.returncode}\n{done.stderr[-6000:]}"
    return done


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
