"""The golden cases on a GPU: the same code path over NCCL and CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.shared import REPOSITORY, shared_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; none is present"),
]


def test_goldens_on_one_gpu() -> None:
    golden = shared_path("golden")
    command = [sys.executable, "tools/check_parity.py", "--golden", str(golden), "--verbose"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok   case") == len(list(golden.glob("case*.json")))
