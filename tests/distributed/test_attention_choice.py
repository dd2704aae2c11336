"""The attention backend that a trial chooses is the same on all ranks."""

from __future__ import annotations

import pytest

from tests.distributed.launch import on_ranks


@pytest.mark.distributed
def test_all_ranks_take_the_first_ones_choice() -> None:
    output = on_ranks(3, "tests/distributed/run_attention_choice.py")
    (line,) = [line for line in output.splitlines() if line.startswith("chosen ")]
    assert line.startswith("chosen sdpa: sdpa ") and "varlen_te not: needs a GPU" in line
