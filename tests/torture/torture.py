"""Kill a run again and again; every restart must find a complete checkpoint and repeat the uninterrupted run's bits.

    python -m tests.torture.torture --kills 20 [--seed 1] [--json FILE]

A tiny run on two ranks (tp 2) saves in the background every other step.  Each kill is addressed: from (seed, number)
follow the event to wait for (so many seconds after the start, a step, a save under way, a publication), a delay behind
it, and the victims: both ranks with their writers, both ranks without (their writers live on as orphans while the next
process starts), or one rank, upon which the other is ended as a launcher would.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lance.checkpoint.digests import damaged
from megatron_lance.checkpoint.manifest import LATEST_FILE, find_checkpoint
from megatron_lance.config.errors import run_command
from megatron_lance.profiling.provenance import provenance
from megatron_lance.training import train
from tests.tiny import TinyRun, make_tiny_run

RANKS, EVENTS, VICTIMS = 2, ("start", "step", "save", "save", "publication"), ("all", "trainers", "rank 0", "rank 1")
SETTINGS = (
    "parallel.tensor_model_parallel_size=2 training.save_interval=2 training.async_save=true training.ema_decay=0.9 "
    "training.resume=auto training.keep_last=3 training.fully_reshardable_every=4"
).split()
EXACT = ("loss", "ce_loss", "velocity_loss", "grad_norm", "learning_rate")
_LOOK = os.WEXITED | os.WNOWAIT  # a rank is not reaped, so its number, and its group's, is given to no other process
PATIENCE = 240.0  # seconds that an event may take


@dataclass(frozen=True)
class Kill:
    """When and whom.

    Attributes:
        number: of this kill.
        event: of EVENTS.
        count: of events of this process to wait for.
        delay: seconds behind the event.
        victim: of VICTIMS.
    """

    number: int
    event: str
    count: int
    delay: float
    victim: str

    @classmethod
    def at(cls, seed: int, number: int, events: tuple[str, ...] = EVENTS) -> Kill:
        """The kill of this address."""
        stream = random.Random(f"{seed}/{number}")
        event = stream.choice(events)
        longest = {"start": 4.0, "step": 0.5, "save": 0.6, "publication": 0.2}[event]
        count = stream.randint(1, {"step": 3, "save": 2}.get(event, 1))
        return cls(number, event, count, round(stream.uniform(0.0, longest), 3), stream.choice(VICTIMS))


class Launch:
    """A run on RANKS processes, each with its writers in a process group of its own.

    They are forked from this process, which has imported everything and started no threads: a restart takes a second.
    """

    def __init__(self, tiny: TinyRun, run_dir: Path, steps: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = [*SETTINGS, f"training.run_dir={run_dir}", f"training.train_iters={steps}"]
        arguments = ["--config", str(tiny.config), *settings]
        self.log = tempfile.TemporaryFile()
        self.ranks = [self._start(rank, port, arguments) for rank in range(RANKS)]

    def _start(self, rank: int, port: int, arguments: list[str]) -> int:
        child = os.fork()
        if child == 0:
            try:
                os._exit(_train(rank, port, arguments, self.log.fileno()))
            finally:  # never back into what this process was doing
                os._exit(1)
        os.setpgid(child, child)
        return child

    def said(self) -> str:
        """What it wrote."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def ended(self) -> bool:
        """Whether a rank has ended by itself."""
        return any(os.waitid(os.P_PID, rank, _LOOK | os.WNOHANG) is not None for rank in self.ranks)

    def finish(self) -> None:
        """Wait until the run has ended well."""
        for rank in self.ranks:
            end = os.waitid(os.P_PID, rank, _LOOK)
            assert end is not None and end.si_status == 0, self.said()
        self.clear_away()

    def kill(self, victim: str) -> None:
        """Kill -9; returns when no rank is left."""
        if victim.startswith("rank"):
            number = int(victim.split()[1])
            os.killpg(self.ranks[number], signal.SIGKILL)
            os.kill(self.ranks[1 - number], signal.SIGTERM)
            time.sleep(0.5)
        for rank in self.ranks:
            if victim == "trainers":
                os.kill(rank, signal.SIGKILL)
            else:
                os.killpg(rank, signal.SIGKILL)
        for rank in self.ranks:
            os.waitid(os.P_PID, rank, _LOOK)

    def clear_away(self) -> None:
        """End what has outlived the ranks, and let go of their numbers."""
        for rank in self.ranks:
            os.killpg(rank, signal.SIGKILL)
            os.waitpid(rank, 0)


def _train(rank: int, port: int, arguments: list[str], log: int) -> int:
    """One rank of the training command; returns its exit code."""
    os.setpgid(0, 0)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    return run_command("train", lambda: train.main(arguments))


def steps_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Lines of metrics.jsonl by step; a torn last one is left out."""
    file = run_dir / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {line["step"]: {name: line[name] for name in EXACT} for line in lines}


def _latest(root: Path) -> str:
    pointer = root / LATEST_FILE
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""


def _partials(root: Path) -> set[str]:
    return {path.name for path in root.glob(".step_*.partial")} if root.is_dir() else set()


def wait_for(kill: Kill, run_dir: Path, launch: Launch) -> None:
    """Until the kill's moment, or until the run has ended."""
    root, start = run_dir / "checkpoints", time.monotonic()
    steps, latest, known = max(steps_of(run_dir), default=0), _latest(root), _partials(root)
    saves: set[str] = set()
    reached: dict[str, Callable[[], bool]] = {
        "start": lambda: True,
        "step": lambda: max(steps_of(run_dir), default=0) >= steps + kill.count,
        "save": lambda: len(saves) >= kill.count,
        "publication": lambda: _latest(root) != latest,
    }
    while not reached[kill.event]() and not launch.ended():
        if time.monotonic() - start > PATIENCE:
            raise AssertionError(f"{kill} did not come about:\n{launch.said()}")
        saves |= _partials(root) - known
        time.sleep(0.01)
    time.sleep(kill.delay)


def complete_step(tiny: TinyRun, run_dir: Path) -> int:
    """Step of the checkpoint that a restart goes on from, all its digests checked; 0 if none was ever published."""
    run = tiny.load(f"training.run_dir={run_dir}", "training.resume=auto")
    found = find_checkpoint(run.training)
    if found is None:
        return 0
    assert not damaged(found.folder), f"{found.folder}: {damaged(found.folder)}"
    return found.manifest.step


def torture(tiny: TinyRun, folder: Path, kills: list[Kill], steps: int) -> dict[str, Any]:
    """Run uninterrupted, then with kills, and compare.

    Args:
        tiny: data and configuration.
        folder: for both runs.
        kills: in order; those that come after the run's end do not count.
        steps: of each run.

    Returns:
        what happened, as a JSON object.

    Raises:
        AssertionError: if a checkpoint is lost or damaged, or a number differs from the uninterrupted run's.
    """
    whole = Launch(tiny, folder / "whole", steps)
    whole.finish()
    expected, run_dir = steps_of(folder / "whole"), folder / "killed"
    assert list(expected) == list(range(1, steps + 1))
    rows: list[dict[str, Any]] = []
    before: Launch | None = None
    for kill in kills:
        published, left = complete_step(tiny, run_dir), _partials(run_dir / "checkpoints")
        launch = Launch(tiny, run_dir, steps)
        wait_for(kill, run_dir, launch)
        if launch.ended():
            launch.finish()
            break
        saving = bool(_partials(run_dir / "checkpoints") - left)
        launch.kill(kill.victim)
        if before is not None:
            before.clear_away()
        before = launch
        seen = steps_of(run_dir)
        assert all(seen[step] == expected[step] for step in seen), f"{kill}: a step differs"
        found = complete_step(tiny, run_dir)
        assert found >= published, f"{kill}: step {published} was published, and now {found} is the newest"
        row = {"steps_done": max(seen, default=0), "save_under_way": saving, "complete_step": found}
        rows.append({**asdict(kill), **row})
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    last = Launch(tiny, run_dir, steps)
    last.finish()
    if before is not None:
        before.clear_away()
    assert steps_of(run_dir) == expected, "the numbers after all restarts differ from the uninterrupted run's"
    assert complete_step(tiny, run_dir) == steps
    inside = sum(row["save_under_way"] for row in rows)
    return {"ranks": RANKS, "steps": steps, "kills": len(rows), "inside_saves": inside, "identical": True, "each": rows}


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1, help="addresses the kills")
    parser.add_argument("--steps", type=int, default=40, help="of the run")
    parser.add_argument("--events", nargs="+", choices=sorted(set(EVENTS)), default=EVENTS, help="to wait for")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what happened")
    options = parser.parse_args()
    kills = [Kill.at(options.seed, number, tuple(options.events)) for number in range(options.kills)]
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as apart:  # its threads stay there
            tiny = apart.submit(make_tiny_run, Path(folder)).result()
        importlib.import_module("megatron_lance.training.run")
        start = time.perf_counter()
        result = torture(tiny, Path(folder), kills, options.steps)
        result["seconds"] = round(time.perf_counter() - start, 1)
    if options.json:
        command = " ".join(["python -m tests.torture.torture", *sys.argv[1:]])
        options.json.write_text(json.dumps({"command": command, **provenance(), **result}, indent=1) + "\n")
    kills_done, inside = result["kills"], result["inside_saves"]
    sys.stdout.write(f"{kills_done} kills, {inside} inside saves: all restarts complete, all numbers equal\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
