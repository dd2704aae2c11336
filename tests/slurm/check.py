"""A real SLURM on this machine: submit, end of time, preempt, requeue, finish; the loss curve is unbroken.

    python -m tests.slurm.check [--out FILE.json] [--steps 150]      (root; minutes)

One run is left alone.  The other, by the same examples/slurm/one_node.sbatch, is told by SIGUSR1 that its time ends
(what --signal sends), then requeued by an operator as a preemption does it (SIGTERM, then SIGKILL).  Both must end with
the same metrics, bit for bit.  tests/slurm/test_slurm.py runs this where MEGATRON_LANCE_SLURM=1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_lance.training.events import read_events
from tests.shared import REPOSITORY
from tests.slurm.cluster import Cluster, cluster, why_not
from tests.tiny import TinyRun, make_tiny_run

SAME = ("step", "loss", "ce_loss", "velocity_loss", "grad_norm", "learning_rate", "loss_by_source", "tokens_seen")
PATIENCE = 900.0
"""Seconds for anything to happen."""


def submit(made: Cluster, tiny: TinyRun, run_dir: Path, steps: int) -> str:
    """Submit a run of two ranks; returns the job's number."""
    sizes = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60"]
    settings = [f"training.run_dir={run_dir}", f"training.train_iters={steps}", "training.log_interval=10"]
    settings += [f"training.save_interval={steps // 8}"]  # a save before each stop
    return made.run(
        *("sbatch", "--parsable", f"--chdir={REPOSITORY}", f"--output={run_dir}.log", *sizes),
        *("examples/slurm/one_node.sbatch", *settings),
        CONFIG=str(tiny.config),
        PYTHON=sys.executable,
        OMP_NUM_THREADS="1",
        WAIT="60",
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
REQUEUE_SECONDS = 15.0
"""That a job which goes back into the queue may look as if it had ended."""


def hurried(made: Cluster, number: str) -> dict[str, str]:
    """What SLURM knows of a job; one that was requeued need not wait two minutes, as SLURM wants it to."""
    job = made.job(number)
    if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
        made.run("scontrol", "update", f"JobId={number}", "StartTime=now")
    return job


def await_step(made: Cluster, number: str, run_dir: Path, step: int) -> None:
    """Wait until a run has done a step.

    Raises:
        RuntimeError: if it ends before, or takes too long.
    """
    until = time.monotonic() + PATIENCE
    alive = time.monotonic()
    while not any(line["step"] >= step for line in metrics(run_dir)):
        state = hurried(made, number)["JobState"]
        if state not in ENDS:
            alive = time.monotonic()
        if time.monotonic() > min(until, alive + REQUEUE_SECONDS):
            raise RuntimeError(f"job {number} is {state} before step {step}; see {run_dir}.log")
        time.sleep(0.1)


def await_starts(made: Cluster, number: str, restarts: int) -> None:
    """Wait until a job was put back into the queue so many times."""
    until = time.monotonic() + PATIENCE
    while int(made.job(number)["Restarts"]) < restarts:
        if time.monotonic() > until:
            raise RuntimeError(f"job {number} was not requeued")
        time.sleep(0.5)


def await_end(made: Cluster, number: str) -> dict[str, str]:
    """Wait for the end of a job."""
    until = time.monotonic() + PATIENCE
    alive = time.monotonic()
    while (job := hurried(made, number))["JobState"] not in ENDS or time.monotonic() < alive + REQUEUE_SECONDS:
        if job["JobState"] not in ENDS:
            alive = time.monotonic()
        if time.monotonic() > until:
            raise RuntimeError(f"job {number} does not end: {job['JobState']}")
        time.sleep(0.5)
    return job


def check(folder: Path, steps: int) -> dict[str, Any]:
    """Run both jobs and compare.

    Raises:
        RuntimeError: if something does not happen.
        AssertionError: if something is not as it must be.
    """
    tiny = make_tiny_run(folder / "tiny")
    left_alone, stopped = folder / "left_alone", folder / "stopped"
    with cluster(folder / "slurm") as made:
        first = submit(made, tiny, left_alone, steps)
        alone = await_end(made, first)
        assert (alone["JobState"], alone["ExitCode"]) == ("COMPLETED", "0:0"), alone
        second = submit(made, tiny, stopped, steps)
        await_step(made, second, stopped, steps // 5)
        made.run("scancel", "--signal=USR1", second)
        await_starts(made, second, 1)
        await_step(made, second, stopped, 3 * steps // 5)
        made.run("scontrol", "requeue", second)
        await_starts(made, second, 2)
        end = await_end(made, second)
        version = made.run("sinfo", "--version")
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "2"), end
    one, other = ([{name: line[name] for name in SAME} for line in metrics(run)] for run in (left_alone, stopped))
    assert [line["step"] for line in one] == list(range(1, steps + 1))
    assert one == other, "the metrics of the run that was stopped differ from those of the run that was not"
    events = read_events(stopped)
    kinds = [(event["event"], event.get("exit_code")) for event in events if event["event"] in ("started", "ended")]
    assert kinds == [("started", None), ("ended", 6), ("started", None), ("ended", 6), ("started", None), ("ended", 0)]
    reasons = [event["message"] for event in events if event.get("exit_code") == 6]
    assert "SIGUSR1" in reasons[0] and "SIGTERM" in reasons[1], reasons
    return {
        "slurm": version,
        "steps": steps,
        "ranks": 2,
        "restarts": int(end["Restarts"]),
        "events": [{name: value for name, value in event.items() if name != "folder"} for event in events],
        "loss": [line["loss"] for line in other],
        "differing_values": 0,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the result as JSON")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="of each run (default 150)")
    args = parser.parse_args(arguments)
    if reason := why_not():
        sys.stderr.write(f"cannot run here: {reason}\n")
        return 1
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    result = check(folder, args.steps)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    ends = [event["message"] for event in result["events"] if event["event"] == "ended" and "message" in event]
    sys.stdout.write("\n".join([*ends, f"finished; {args.steps} steps equal to the run that was left alone"]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
