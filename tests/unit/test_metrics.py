"""metrics.jsonl and TensorBoard across restarts: no step stands twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lance.training.metrics import MetricsWriter, StepMetrics


def write(folder: Path, steps: range, loss: float, steps_done: int = 0) -> None:
    with MetricsWriter(folder, True, steps_done) as writer:
        for step in steps:
            writer.write(
                StepMetrics(step, loss, 0.0, 0.0, 1.0, 1e-3, 1.0, 1.0, 1.0, 0.1, 0, {"t2i": loss}, False, 0.0, 0.0)
            )


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["loss"] for line in lines}


def test_a_resumed_run_drops_later_steps(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), 1.0)
    write(tmp_path, range(4, 7), 2.0, steps_done=3)
    assert losses(tmp_path) == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: 2.0}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("train/loss", "train/loss/t2i"):
        assert [(event.step, event.value) for event in board.Scalars(name)] == list(losses(tmp_path).items())


def test_a_fresh_start_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4), 1.0)
    write(tmp_path, range(1, 3), 2.0)
    assert losses(tmp_path) == {1: 2.0, 2: 2.0}


def test_a_torn_line_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, range(1, 3), 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    write(tmp_path, range(3, 4), 2.0, steps_done=2)
    assert losses(tmp_path) == {1: 1.0, 2: 1.0, 3: 2.0}
    assert "dropped an incomplete line" in caplog.text
