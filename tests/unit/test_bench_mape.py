"""The benchmark of QK-norm + MaPE: what it counts and says; not how fast anything is."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
import torch

from megatron_lance.config.errors import UserError
from megatron_lance.profiling.benchmarks import mape
from megatron_lance.profiling.benchmarks.mape import Contender, Inputs, Shape


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    mape.add_arguments(parser)
    return parser.parse_args(given)


def test_heads_of_a_rank() -> None:
    assert [Shape.of(tp) for tp in (1, 2, 4)] == [Shape(2, 8, 8), Shape(1, 8, 8), Shape(1, 8, 4)]


def test_bytes_that_must_move() -> None:
    """Counted by hand for one row of bf16: a head is 256 bytes."""
    assert Shape.of(1).bytes_moved(1, 2) == {"forward": 40 * 256 + 12, "backward": 58 * 256 + 12, "both": 98 * 256 + 24}
    # of 10 heads in QKV, q 4, k and v are used; backward reads them (v apart) and their gradients, and writes all 10
    assert Shape.of(4).bytes_moved(1, 2)["backward"] == (5 + 6 + 10) * 256 + 12


def test_a_run_measures_every_phase_of_what_is_there() -> None:
    options = arguments("--rows", "8", "--tp", "4", "--repeats", "2", "--only", "eager", "transformer_engine")
    result = mape.run(options)
    (case,) = result["cases"]
    assert {phase: sorted(figures) for phase, figures in case["times"]["eager"].items()} == dict.fromkeys(
        ("forward", "backward", "both"), ["gb_per_s", "p20_ms", "p50_ms", "p80_ms"]
    )
    for phase, figures in case["times"]["eager"].items():
        assert 0 < figures["p20_ms"] <= figures["p50_ms"] <= figures["p80_ms"]
        assert figures["gb_per_s"] == pytest.approx(case["bytes"][phase] / figures["p50_ms"] / 1e6)
    assert mape.table(result).count("% of copy") == 3


def test_a_contender_that_fails_is_named_and_one_whose_graph_serves_once_has_no_backward_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graphs: list[int] = []

    def contenders(x: Inputs, shape: Shape, *rest: object) -> Iterator[tuple[str, Contender]]:
        def fails() -> tuple[torch.Tensor, ...]:
            raise RuntimeError("no kernel")

        def call() -> tuple[torch.Tensor, ...]:
            graphs.append(1)
            return mape._op(x, shape, "reference")

        yield "fused", Contender(fails, x.leaves)
        yield "transformer_engine", Contender(call, x.leaves, once=True)

    monkeypatch.setattr(mape, "_contenders", contenders)
    result = mape.run(arguments("--rows", "8", "--tp", "4", "--repeats", "2"))
    (case,) = result["cases"]
    assert case["failed"] == {"fused": "RuntimeError: no kernel"} and graphs
    assert set(case["times"]["transformer_engine"]) == {"forward", "both"}
    table = mape.table(result)
    assert "fused: RuntimeError: no kernel" in table and table.count("% of copy") == 2


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"--tp \[3\]"):
        mape.run(arguments("--tp", "3"))
