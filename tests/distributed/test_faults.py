"""Runs on two ranks that are stopped, stand still, or whose loss runs away: what they say, and that nothing is lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lance.checkpoint.manifest import checkpoint_at
from megatron_lance.config.errors import ExitCode
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.training.events import read_events
from tests.distributed.launch import on_ranks
from tests.shared import REPOSITORY
from tests.tiny import TinyRun, with_validation

pytestmark = pytest.mark.distributed

SCRIPT = str(REPOSITORY / "tests" / "distributed" / "run_faults.py")
STEPS = 7
SPIKE = [f"training.{s}" for s in ("spike_factor=5", "spike_steps=2", "spike_window=2", "save_interval=2")]


class Faults:
    """Runs below one folder."""

    def __init__(self, folder: Path, tiny: TinyRun) -> None:
        self.folder, self.tiny = folder, tiny
        self.jobs: list[dict[str, Any]] = []

    def add(self, name: str, *settings: str, fault: str = "", step: int = 0, config: Path | None = None) -> None:
        fixed = [f"training.run_dir={self.folder / name}", f"training.train_iters={STEPS}"]
        job = {
            "config": str(config or self.tiny.config),
            "overrides": [*fixed, *settings],
            "fault": fault,
            "step": step,
        }
        self.jobs.append(job)

    def plan(self) -> str:
        """A file with the jobs added since the last one."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}.json"
        path.write_text(json.dumps(self.jobs), encoding="utf-8")
        self.jobs = []
        return str(path)

    def outcomes(self, name: str) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"{name}_outcome" / f"{rank}.json").read_text()) for rank in (0, 1)]

    def losses(self, name: str) -> dict[int, float]:
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {line["step"]: line["loss"] for line in map(json.loads, lines)}

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder / name) if event["event"] == kind]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory, tiny_run: TinyRun) -> Faults:
    found = Faults(tmp_path_factory.mktemp("faults"), tiny_run)
    found.add("whole")
    found.add("stopped", "training.async_save=true", fault="signal", step=3)
    found.add("stopped", "training.resume=auto")
    found.add("late", "training.stop_after_minutes=1e-9")
    found.add("spike", *SPIKE, fault="spike", step=5)
    overlap = [f"parallel.{name}=true" for name in ("overlap_grad_reduce", "overlap_param_gather")]
    found.add("spike_overlap", *SPIKE, *overlap, fault="spike", step=5)
    found.add("spikes", *SPIKE, "training.max_rewinds=0", fault="spike", step=5)
    found.add("spikes_on", *SPIKE, "training.max_rewinds=1", fault="spikes", step=5)
    held = with_validation(tiny_run, found.folder / "held")
    found.add("look", "validation.interval=3", fault="look", step=3, config=held.config)
    found.add("no_way_back", *SPIKE, "training.save_interval=0", fault="spike", step=5)
    found.add("slow", "training.straggler_factor=0.01", "training.straggler_interval=3")
    on_ranks(2, SCRIPT, found.plan())
    return found


def test_a_signal_to_one_rank_stops_all_after_the_step_with_a_checkpoint(faults: Faults) -> None:
    for outcome in faults.outcomes("stopped"):
        assert outcome == {}  # the second run of this folder went to its end
    started, again = faults.events("stopped", "started")
    assert (started["step"], again["step"], started["dp"]) == (0, 3, 2)
    stopped, finished = faults.events("stopped", "ended")
    assert (stopped["step"], stopped["reason"], stopped["exit_code"]) == (3, "Stopped", ExitCode.STOPPED)
    assert "stopped by SIGUSR1 after step 3 of 7, which is saved" in stopped["message"]
    assert (finished["step"], finished["reason"], finished["exit_code"]) == (STEPS, "finished", ExitCode.FINISHED)
    assert faults.losses("stopped") == faults.losses("whole")


def test_the_clock_stops_a_run_that_has_saved(faults: Faults) -> None:
    for outcome in faults.outcomes("late"):
        assert outcome["error"] == "Stopped" and outcome["exit_code"] == ExitCode.STOPPED
        assert "stopped by training.stop_after_minutes after step 1 of 7" in outcome["message"]
    assert checkpoint_at(faults.folder / "late").manifest.step == 1


@pytest.mark.parametrize("name", ["spike", "spike_overlap"])
def test_after_a_loss_spike_the_run_goes_on_from_before_it_without_its_packs(faults: Faults, name: str) -> None:
    (spike,), (rewound,) = faults.events(name, "spike"), faults.events(name, "rewound")
    assert (spike["first"], spike["step"]) == (5, 6) and min(spike["losses"]) > 5 * spike["usual"]
    assert rewound["step"] == 4 and rewound["left_out"] == [[4, 2]]
    losses, whole = faults.losses(name), faults.losses("whole")
    assert list(losses) == list(range(1, STEPS + 1)) and max(losses.values()) < 5 * max(whole.values())
    assert [losses[step] for step in range(1, 5)] == [whole[step] for step in range(1, 5)]
    checkpoint = checkpoint_at(faults.folder / name)
    assert checkpoint.manifest.step == STEPS and checkpoint.manifest.left_out == [[4, 2]]
    assert faults.outcomes(name) == [{}, {}]


def test_a_rewound_run_is_the_run_that_goes_on_from_its_checkpoint(faults: Faults) -> None:
    """Bit for bit: nothing of the steps that were taken back is left, and what is left out is in the checkpoint."""
    step4 = faults.folder / "spike" / "checkpoints" / "step_00000004"
    faults.add("resumed", *SPIKE, f"training.resume={step4}")
    on_ranks(2, SCRIPT, faults.plan())
    rewound = faults.losses("spike")
    assert faults.losses("resumed") == {step: rewound[step] for step in range(5, STEPS + 1)}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("spikes", "after 0 rewinds"),
        ("spikes_on", "after 1 rewinds"),  # the losses after the rewind are held against those before it
        ("no_way_back", "no checkpoint is older than the spike"),
    ],
)
def test_spikes_without_a_way_back_end_the_run(faults: Faults, name: str, why: str) -> None:
    for outcome in faults.outcomes(name):
        assert outcome["exit_code"] == ExitCode.NON_FINITE
        assert outcome["message"].startswith("loss spike: loss ") and why in outcome["message"]


def test_a_signal_during_validation_cuts_it_short_and_the_next_step_is_the_last(faults: Faults) -> None:
    for outcome in faults.outcomes("look"):
        assert "stopped by SIGUSR1 after step 4 of 7" in outcome["message"]
    (line,) = (faults.folder / "look" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    planned = len(PackIndex.open(str(faults.folder / "held" / "held_out"), for_validation=True))
    assert json.loads(line)["packs"] == 2 < planned  # one round of both ranks


def test_slow_replicas_are_named_with_their_hosts(faults: Faults) -> None:
    found = faults.events("slow", "straggler")
    assert {event["step"] for event in found} == {3, 6} and {event["replica"] for event in found} == {0, 1}
    assert all(event["hosts"] == [socket.gethostname()] and event["factor"] > 0 for event in found)


def test_a_rank_that_does_not_answer_ends_the_others(faults: Faults) -> None:
    faults.add("frozen", "training.hang_seconds=4", fault="freeze", step=2)
    plan = faults.plan()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    base |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([sys.executable, SCRIPT, plan], env={**base, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        _, said = ranks[0].communicate(timeout=200)
        assert ranks[0].returncode == ExitCode.HANG, said.decode()
        assert ranks[1].poll() is None
    finally:
        for rank in ranks:
            rank.kill()
    for part in ("hang: no progress for 4 s: rank 0 on ", "of step 2", "hang: silent ranks: 1", "in run_step"):
        assert part in said.decode(), part
    (event,) = faults.events("frozen", "hang")
    assert event["step"] == 2 and event["silent"] == [1]
