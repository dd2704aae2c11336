"""The check of examples/slurm on a real SLURM; by itself it is too slow, and needs root."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.slurm.check import check
from tests.slurm.cluster import why_not


def test_a_stopped_and_requeued_run_equals_one_that_was_left_alone() -> None:
    if os.environ.get("MEGATRON_LANCE_SLURM") != "1":
        pytest.skip("starts a SLURM cluster and takes minutes; set MEGATRON_LANCE_SLURM=1")
    if reason := why_not():
        pytest.skip(f"no SLURM here: {reason}")
    result = check(Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp")), steps=60)
    assert result["restarts"] == 2 and result["differing_values"] == 0
