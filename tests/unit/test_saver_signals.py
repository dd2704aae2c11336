"""Processes that a save starts outlive the signals that a scheduler sends to every process of a run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from megatron_lance.checkpoint.saver import helpers_spared


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_helper_outlives_the_signal_and_the_run_still_sees_it(number: signal.Signals) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda got, frame: seen.append(got))
    try:
        with helpers_spared():
            manager = multiprocessing.get_context("spawn").Manager()
            os.kill(os.getpid(), number)
        deadline = time.monotonic() + 30  # another thread may take the signal, and hands it on when it next runs
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen == [number]
        os.kill(manager._process.pid, number)  # type: ignore[attr-defined]
        queue = manager.Queue()
        queue.put("still there")
        assert queue.get(timeout=30) == "still there"
        manager.shutdown()
    finally:
        signal.signal(number, before)
