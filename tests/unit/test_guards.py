"""What ends a run early or sends it back: signals, clock, watchdog, stragglers, loss spikes; and the log of events."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lance.config.errors import DataError, ExitCode, NonFiniteError
from megatron_lance.config.schema import TrainingConfig
from megatron_lance.data.position import LeftOut, batch_of, batches_before, gone_back
from megatron_lance.training.events import EVENTS_FILE, EventLog, read_events
from megatron_lance.training.guards import guarded
from megatron_lance.training.loop import Skips, StepDone
from megatron_lance.training.pulse import Pulse, StragglerWatch
from megatron_lance.training.signals import StopReason, StopRequest
from megatron_lance.training.spikes import LossSpike, SpikeWatch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_the_process_goes_on(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest(minutes=0) as stop:
        assert stop.reason is StopReason.NONE and not stop.reason
        os.kill(os.getpid(), number)
        assert stop.reason is StopReason[number.name] and stop.reason.text == number.name
    assert signal.getsignal(number) is before


def test_a_forked_process_lets_the_signals_pass() -> None:
    with StopRequest(minutes=0) as stop:
        writer = multiprocessing.get_context("fork").Process(target=_signalled_itself)
        writer.start()
        writer.join()
        assert writer.exitcode == 7 and stop.reason is StopReason.NONE


def _signalled_itself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(7)


def test_the_clock_stops_a_run() -> None:
    with StopRequest(minutes=1e-9) as stop:
        assert stop.reason is StopReason.TIME and stop.reason.text == "training.stop_after_minutes"


def _pulses(*busy: float, data: float = 0.0) -> list[Pulse]:
    """Two ranks a replica; the second of each is faster."""
    return [Pulse(StopReason.NONE, i // 2, data, busy[i // 2] * (1 - 0.5 * (i % 2))) for i in range(2 * len(busy))]


def test_a_replica_that_others_wait_for_is_named() -> None:
    watch = StragglerWatch(factor=1.5, interval=2)
    assert watch.after(_pulses(1.0, 1.0, 9.0)) == []  # one slow step is not yet a straggler
    (found,) = watch.after(_pulses(1.0, 1.0, 1.0, data=1.0))
    assert found.replica == 2 and found.ranks == (4, 5) and found.steps == 2
    assert found.factor == pytest.approx(11 / 3) and found.data_share == pytest.approx(1 / 11)
    assert "replica 2 (ranks 4, 5) took 3.67 times" in found.line() and "9% of that" in found.line()
    assert watch.after(_pulses(1.0, 1.0, 9.0)) == []  # counted anew
    assert StragglerWatch(factor=0.0, interval=1).after(_pulses(1.0, 1.0, 9.0)) == []


def test_a_spike_is_several_high_losses_in_a_row() -> None:
    watch = SpikeWatch(factor=2.0, steps=2, window=3)
    for step, loss in enumerate([9.0, 1.0, 1.2, 1.1, 5.0, 1.0, 1.3], start=1):
        watch.after(step, loss)  # the first has nothing before it, the fifth is alone
    watch.after(8, 3.0)
    with pytest.raises(LossSpike) as spike:
        watch.after(9, 4.0)
    assert (spike.value.first, spike.value.last, spike.value.losses) == (8, 9, (3.0, 4.0))
    assert spike.value.usual == pytest.approx(1.1)
    again = SpikeWatch(factor=2.0, steps=1, window=3)
    again.remember([1.0, 1.2, 1.1, 1.3])  # after a rewind or a restart there is no window without a watch
    with pytest.raises(LossSpike):
        again.after(8, 3.0)
    off = SpikeWatch(factor=0.0, steps=1, window=1)
    for step in range(5):
        off.after(step, 10.0**step)


def test_packs_left_out_are_never_trained_on() -> None:
    assert [batch_of(step, []) for step in range(3)] == [0, 1, 2]
    once = gone_back([], to=4, last=7)
    assert once == [LeftOut(4, 3)]
    assert [batch_of(step, once) for step in range(3, 7)] == [3, 7, 8, 9]
    again = gone_back(once, to=4, last=6)  # batches 7 and 8 too
    assert [batch_of(step, again) for step in range(3, 6)] == [3, 9, 10]
    later = gone_back(once, to=6, last=8)
    assert [batch_of(step, later) for step in range(3, 8)] == [3, 7, 8, 11, 12]
    earlier = gone_back(later, to=2, last=7)  # step 6 trained on batch 11
    assert [batch_of(step, earlier) for step in range(4)] == [0, 1, 12, 13]


def test_events_are_lines_and_a_torn_one_is_left_out(tmp_path: Path) -> None:
    EventLog(tmp_path, enabled=True).write(3, "checkpoint", folder="x")
    EventLog(tmp_path, enabled=False).write(4, "nothing")
    with (tmp_path / EVENTS_FILE).open("a", encoding="utf-8") as file:
        file.write('{"time": "20')
    (event,) = read_events(tmp_path)
    assert event["step"] == 3 and event["event"] == "checkpoint" and event["folder"] == "x"
    EventLog(tmp_path, enabled=True).write(3, "started")  # does not go on in the torn line
    EventLog(tmp_path, enabled=True).write(5, "ended")
    assert [event["event"] for event in read_events(tmp_path)] == ["checkpoint", "started", "ended"]


def test_an_event_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / EVENTS_FILE).mkdir()
    EventLog(tmp_path, enabled=True).write(3, "ended", exit_code=2)
    assert "cannot be written (Is a directory)" in caplog.text and "'exit_code': 2" in caplog.text


@pytest.mark.parametrize(
    ("past", "more"), [((), 3), ((1.0, None), 2), ((None, None), 1), ((None, 1.0), 3), ((1.0, None, None, 1.0), 3)]
)
def test_steps_left_out_in_a_row_are_counted_across_a_restart(
    tmp_path: Path, past: tuple[float | None, ...], more: int
) -> None:
    skips = Skips(3, EventLog(tmp_path, enabled=True), past)
    done = StepDone(SimpleNamespace(step=9, skipped=True), (), (4, 5))  # type: ignore[arg-type]
    for _ in range(more - 1):
        skips.after(done)
    with pytest.raises(NonFiniteError, match=r"step 9: 3 steps in a row were not finite, the last with packs 4, 5;"):
        skips.after(done)
    assert read_events(tmp_path)[-1]["packs"] == [4, 5]


HANGING = """
import sys, time
from pathlib import Path
from megatron_lance.training.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), seconds=0.5, rank=1, world_size=3) as watchdog:
    watchdog.at("forward and backward", 12)
    for _ in range(4):
        time.sleep(0.2)
        watchdog.at("update", 12)
    time.sleep(60)
"""


def test_the_watchdog_says_where_a_rank_stands_and_ends_it(tmp_path: Path) -> None:
    reports = tmp_path / "hang"
    reports.mkdir()
    (reports / "rank_1.txt").write_text("of a process before this one\n", encoding="utf-8")
    (reports / "rank_7.txt").write_text("of a larger world\n", encoding="utf-8")
    hung = subprocess.run([sys.executable, "-c", HANGING, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert hung.returncode == ExitCode.HANG, hung.stderr
    assert "hang: no progress for 0.5 s: rank 1 on " in hung.stderr and "at 'update' of step 12" in hung.stderr
    assert 'File "<string>", line 10 in <module>' in hung.stderr  # the stack of what hangs
    assert "hang: silent ranks: 0, 2" in hung.stderr
    (event,) = read_events(tmp_path)
    assert event["event"] == "hang" and event["silent"] == [0, 2]
    assert len(event["stations"]) == 1 and "'update' of step 12" in event["stations"][0]


def test_the_watchdog_ends_a_rank_that_cannot_report(tmp_path: Path) -> None:
    (tmp_path / "hang").symlink_to("nowhere")  # a disk that is full or gone
    hung = subprocess.run([sys.executable, "-c", HANGING, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert hung.returncode == ExitCode.HANG, hung.stderr
    assert "at 'update' of step 12" in hung.stderr and "hang: no report to " in hung.stderr


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [(None, 0, "finished"), (DataError("x"), 3, "DataError"), (RuntimeError("peer gone"), 1, "RuntimeError")],
)
def test_how_a_run_ends_is_its_last_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, code: int, reason: str
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    settings = TrainingConfig(run_dir=str(tmp_path), hang_seconds=0.0)
    events = EventLog(tmp_path, enabled=True)
    with suppress(DataError, RuntimeError), StopRequest(0) as stop, guarded(settings, stop, events) as guards:
        guards.watchdog.at("update", 4)
        if error is not None:
            raise error
    (event,) = read_events(tmp_path)
    assert (event["event"], event["step"], event["exit_code"], event["reason"]) == ("ended", 4, code, reason)
    assert event.get("message") == (str(error) if error else None)


@pytest.mark.parametrize(
    "left_out",
    [[], [LeftOut(0, 2)], [LeftOut(3, 1), LeftOut(5, 4)], [LeftOut(4, 1), LeftOut(4, 2)], [LeftOut(9, 1)]],
    ids=str,
)
def test_the_batches_before_a_step_are_those_of_the_steps(left_out: list[LeftOut]) -> None:
    for steps in range(9):
        ranges = batches_before(steps, left_out)
        assert [n for start, stop in ranges for n in range(start, stop)] == [
            batch_of(s, left_out) for s in range(steps)
        ]
