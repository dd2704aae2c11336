"""Seconds by part of a trace: made by hand, and of a real step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_lance.profiling.trace import EXPOSED, IDLE, PREFIX, WAIT, length, marked, overlap, part, read_trace, union
from tests.unit.tiny_model import batch_of, build, forward_backward, mixed_pack, one_rank, values_of


def test_intervals() -> None:
    assert union([(3, 5), (0, 1), (4, 7), (9, 9)]) == [(0, 1), (3, 7)]
    assert length([(0, 1), (3, 7)]) == 5
    assert overlap([(0, 4), (6, 8)], [(1, 2), (3, 7)]) == 1 + 1 + 1


def event(name: str, start: float, stop: float, category: str = "cpu_op", **args: Any) -> dict[str, Any]:
    known = {"number": "Sequence number", "id": "External id"}
    named = {known[key]: value for key, value in args.items()}
    return {
        "ph": "X",
        "pid": 1,
        "tid": 1,
        "cat": category,
        "name": name,
        "ts": start * 1e6,
        "dur": (stop - start) * 1e6,
        "args": named,
    }


STEP = [
    event("step", 0, 20, "user_annotation"),
    event(PREFIX + "attention", 1, 4, "user_annotation"),
    event("aten::mm", 1, 3, number=7, id=5),
    event("aten::copy_", 1.5, 2),  # inside another operator: counted with it
    event("aten::add", 5, 6, number=8),
    event("autograd::engine::evaluate_function: MmBackward0", 10, 14, number=7),
    event("aten::mm", 11, 13, id=6),
]


def test_work_goes_to_its_part_and_backward_to_its_forward() -> None:
    flying = {**event("gloo:all_gather", 12, 16), "tid": 2}
    found = read_trace({"traceEvents": [*STEP, flying]}, "step")
    assert found.seconds == 20
    assert found.parts["attention"] == pytest.approx(2 + 2)
    assert found.parts["other"] == pytest.approx(1)
    assert found.parts[EXPOSED] == pytest.approx(3)  # all but the second in which backward works
    assert found.communication == pytest.approx(4)
    assert sum(found.parts.values()) == pytest.approx(20)


def test_kernels_of_a_device_count_instead_of_their_launches() -> None:
    kernels = [
        {**event("gemm", 4, 9, "kernel", id=5), "tid": 9},
        {**event("gemm", 13, 14, "kernel", id=6), "tid": 9},
        {**event("ncclDevKernel_AllGather", 8, 12, "kernel", id=99), "tid": 10},
    ]
    found = read_trace({"traceEvents": [*STEP, *kernels]}, "step")
    assert found.parts["attention"] == pytest.approx(6) and found.parts["other"] == 0
    assert found.parts[EXPOSED] == pytest.approx(3) and found.parts[IDLE] == pytest.approx(11)


@pytest.mark.parametrize("kernel", [False, True])
def test_waiting_for_data_is_its_whole_range_but_for_what_else_happens(kernel: bool) -> None:
    """Two seconds in which nothing runs, one of a copy and one beside the encoders; kernels hide none of it."""
    reading = [
        event(PREFIX + WAIT, 14, 19, "user_annotation"),
        event("aten::copy_", 15, 16),
        event(PREFIX + "encoders", 17, 19, "user_annotation"),
        event("aten::conv3d", 17, 18),
    ]
    kernels = [{**event("conv", 17, 18, "kernel", id=77), "tid": 9}, {**event("gemm", 4, 9, "kernel", id=5), "tid": 9}]
    found = read_trace({"traceEvents": [*STEP, *reading, *(kernels if kernel else [])]}, "step")
    assert found.parts[WAIT] == pytest.approx(4) and sum(found.parts.values()) == pytest.approx(20)
    assert found.parts["other" if kernel else "encoders"] == pytest.approx(1)


def test_a_trace_without_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match="has no range 'step 3'"):
        read_trace({"traceEvents": STEP}, "step 3")


@pytest.mark.parametrize("recompute", [None, "full"])
def test_a_real_step_has_every_part(tmp_path: Path, recompute: str | None) -> None:
    pack = mixed_pack()
    _, batch = batch_of(pack, values_of(pack))
    with one_rank():
        model = build(recompute=recompute)
        forward_backward(model, pack, batch)
        with marked([model]), profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("step"):
            forward_backward(model, pack, batch)
            with part("optimizer"):
                torch.ones(10).add_(1)
        forward_hooks = sum(len(module._forward_hooks) for module in model.modules())
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found = read_trace(json.loads((tmp_path / "trace.json").read_text()), "step")
    for name in ("linears und", "linears gen", "attention", "mape", "norms and activations", "embedder", "heads"):
        assert found.parts[name] > 0, name
    assert found.parts["optimizer"] > 0 and found.parts["encoders"] == found.parts["data wait"] == 0
    assert found.parts[EXPOSED] < 0.01 * found.seconds and forward_hooks == 0
    assert sum(found.parts.values()) == pytest.approx(found.seconds, rel=0.01)
    assert found.parts["other"] < 0.6 * (found.seconds - found.parts[IDLE])  # most of what it does has a name
