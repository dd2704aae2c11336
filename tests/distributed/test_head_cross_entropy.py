"""LM head and cross-entropy a few rows at a time are megatron-core's with whole logits, on several ranks."""

from __future__ import annotations

import pytest

from tests.distributed.launch import on_ranks
from tests.shared import REPOSITORY


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_values_and_gradients_are_those_of_megatron_core(ranks: int) -> None:
    on_ranks(ranks, str(REPOSITORY / "tests" / "distributed" / "run_head_cross_entropy.py"))
