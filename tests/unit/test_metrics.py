"""metrics.jsonl and TensorBoard across restarts: no step stands twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lance.training.metrics import MetricsWriter, StepMetrics


def of_step(step: int, loss: float, mfu: float | None = None) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=loss,
        ce_loss=0.0,
        velocity_loss=0.0,
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens_per_second=1.0,
        padded_tokens_per_second=2.0,
        tflops=2.0,
        mfu=mfu,
        bagel_tflops=3.0,
        bagel_mfu=mfu,
        fill=1.0,
        step_seconds=1.0,
        data_seconds=0.1,
        read_seconds=0.05,
        read_retries=0,
        reader_restarts=0,
        broken=0,
        loss_by_task={"t2i": loss},
        loss_by_source={"pictures": 2 * loss},
        grad_norm_by_expert={"und": 3.0, "gen": 4.0, "shared": 0.0},
        tokens_seen={"text": 10 * step},
        memory_bytes=2**30,
        skipped=False,
        save_stall_seconds=0.0,
        save_seconds=0.0,
    )


def write(folder: Path, steps: range, loss: float, steps_done: int = 0, mfu: float | None = None) -> None:
    with MetricsWriter(folder, True, steps_done) as writer:
        for step in steps:
            writer.write(of_step(step, loss, mfu))


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
    parts = {"loss_of_source/pictures": 2.0, "grad_norm/gen": 4.0, "tokens_seen/text": 10.0, "memory_bytes": 2.0**30}
    assert {name: board.Scalars(f"train/{name}")[0].value for name in parts} == parts


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


def test_losses_of_the_last_steps_are_known_again(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), 1.0)
    path = tmp_path / "metrics.jsonl"
    *kept, last = path.read_text().splitlines()
    path.write_text("\n".join([*kept, json.dumps({**json.loads(last), "skipped": True})]) + "\n")
    for done, losses_then in ((5, [1.0, None]), (4, [1.0, 1.0])):
        with MetricsWriter(tmp_path, True, done) as writer:
            assert writer.losses(2) == losses_then


def test_utilisation_stands_where_the_peak_is_known(tmp_path: Path) -> None:
    write(tmp_path / "known", range(1, 2), 1.0, mfu=0.4)
    write(tmp_path / "unknown", range(1, 2), 1.0)
    for name, mfu in (("known", 0.4), ("unknown", None)):
        line = json.loads((tmp_path / name / "metrics.jsonl").read_text())
        assert (line["tflops"], line["bagel_tflops"]) == (2.0, 3.0)
        assert (line["mfu"], line["bagel_mfu"]) == (mfu, mfu)
        board = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        assert ("train/mfu" in board.Tags()["scalars"]) == (mfu is not None)


def test_a_loss_without_rows_is_no_number_in_the_log() -> None:
    metrics = replace(of_step(3, 0.5), velocity_loss=0.25)
    assert "step 3/9 loss 0.50000 ce - velocity 0.2500 grad norm" in metrics.line(9)
