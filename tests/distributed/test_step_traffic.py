"""The communication of a whole step by formula against what its collectives and sends move."""

from __future__ import annotations

import json

import pytest

from tests.distributed.launch import on_ranks


@pytest.mark.distributed
def test_formulas_are_what_a_step_moves() -> None:
    """By axis and rank within 2%: buckets are padded, and a few sums of single numbers are not in the formulas."""
    output = on_ranks(4, "tests/distributed/run_step_traffic.py")
    (line,) = [line for line in output.splitlines() if line.startswith("RESULTS")]
    wrong = {}
    for name, result in json.loads(line.removeprefix("RESULTS")).items():
        for rank in result["ranks"]:
            for axis, computed in rank["computed"].items():
                counted = rank["counted"][axis]
                if counted != pytest.approx(computed, rel=0.02, abs=1000):
                    wrong[f"{name} rank {rank['rank']} {axis}"] = (counted, computed)
    assert wrong == {}
