"""Train with faults: a list of runs on these ranks, one after another in one process.

    run_faults.py JOBS.json, started by torchrun or with RANK, WORLD_SIZE and MASTER_PORT set

A job is {"config": FILE, "overrides": [...], "fault": NAME or "", "step": STEP}: when the inputs of the step, from 1,
are asked for,

    signal     the last rank sends itself SIGUSR1
    freeze     the last rank stops itself, as a machine that does not answer
    spike      targets are a thousand times too large, in this global batch and the next
    spikes     the same from this global batch on
    look       the last rank sends itself SIGUSR1 when held-out packs are first gone through

Each rank writes <run_dir>_outcome/RANK.json: the error's name, message and exit code, or nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_lance.config.errors import UserError
from megatron_lance.config.loader import load_config

# megatron-core's checkpoint writer spawns a process that imports this file: heavy imports are inside the functions.


@contextmanager
def injected(fault: str, at: int) -> Iterator[None]:
    """A fault while a run goes on."""
    import torch.distributed as dist

    from megatron_lance.training.feed import Feed, StepInputs
    from megatron_lance.training.validation import Validation

    step = Feed.step
    signals = {"signal": signal.SIGUSR1, "freeze": signal.SIGSTOP}

    def faulty(feed: Feed, number: int) -> StepInputs:
        if fault in signals and number + 1 == at and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signals[fault])
        inputs = step(feed, number)
        size = feed.run.training.global_batch_size
        batch = inputs.packs[0] // size + 1
        if (fault == "spike" and batch in (at, at + 1)) or (fault == "spikes" and batch >= at):
            worse = [replace(batch, target=batch.target * 1000) for batch in inputs.batches]
            inputs = replace(inputs, batches=worse)
        return inputs

    forward = Validation._forward

    def signalled(validation: Validation, *arguments: Any) -> Any:
        if fault == "look" and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(validation, *arguments)

    with patch.object(Feed, "step", faulty), patch.object(Validation, "_forward", signalled):
        yield


def attempt(job: dict[str, Any]) -> None:
    """Train, and write down how it ended."""
    import torch.distributed as dist

    from megatron_lance.parallel import groups
    from megatron_lance.training.run import train_run
    from megatron_lance.training.signals import StopRequest

    run = load_config([job["config"]], job["overrides"])
    outcome: dict[str, Any] = {}
    with injected(job["fault"], job["step"]), StopRequest(run.training.stop_after_minutes) as stop:
        try:
            train_run(run, stop)
        except UserError as error:
            outcome = {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
    groups.leave()
    folder = Path(f"{run.training.run_dir}_outcome")
    folder.mkdir(exist_ok=True)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(outcome), encoding="utf-8")


def main() -> None:
    """Run."""
    from megatron_lance.config.logs import set_up_logging
    from megatron_lance.parallel import groups

    set_up_logging(first_rank=True)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        attempt(job)
    groups.destroy()


if __name__ == "__main__":
    main()
