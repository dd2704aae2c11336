"""The formulas of profiling/communication.py against collectives counted in real forward and backward passes."""

from __future__ import annotations

import json

import pytest

from megatron_lance.config.schema import ModelConfig
from megatron_lance.profiling.communication import gathered_keys_values, head_splitting, qkv_over_tp, ring
from tests.distributed.launch import on_ranks


def test_formulas_are_what_is_counted() -> None:
    output = on_ranks(4, "tests/distributed/run_communication.py")
    (line,) = [line for line in output.splitlines() if line.startswith("RESULTS")]
    results = json.loads(line.removeprefix("RESULTS"))
    layouts = ("cp4", "tp2-cp2", "tp4", "cp4-recompute")  # recomputed attention sends nothing again
    assert set(results) == {f"{name} {p}" for name in layouts for p in ("float32", "bf16")}
    for name, groups in results.items():
        for kind, found in groups.items():
            assert found["counted"] == pytest.approx(found["computed"], rel=1e-6), (name, kind)
        assert (groups["cp"]["counted"] > 0) == ("cp" in name)
        if "cp" in name:  # und's keys and values are under way before gen projects its own
            assert 0 < groups["cp"]["early"] < groups["cp"]["forward"], name
        assert (groups["tp"]["counted"] > 0) == ("tp" in name)


def test_schemes_of_context_parallelism() -> None:
    """Two key/value heads: heads cannot be split further than two; a ring moves keys and values once more."""
    model, rows = ModelConfig(), 5000
    assert head_splitting(model, rows, 4, 1, 2) is None and head_splitting(model, rows, 2, 2, 2) is None
    assert head_splitting(model, rows, 2, 1, 2) is not None
    ours, theirs = gathered_keys_values(model, rows, 8, 1, 2), ring(model, rows, 8, 1, 2)
    assert ours.forward == theirs.forward == 2 * rows * 8 * 2 * 128 * 2 * 7 / 8
    assert theirs.backward - ours.backward == ours.forward
    assert qkv_over_tp(model, rows, 2, 2).total == 0 < qkv_over_tp(model, rows, 4, 2).total
