"""Train into trouble: a list of runs on these ranks, one after another in one process.

    torchrun --nproc-per-node N run_store.py JOBS.json

A job is {"config": FILE, "overrides": [...], "flip": FILE or null, "limit": BYTES or null, "free": BYTES or null,
"hold": STEP or null, "sees": STEP or null, "kill": BOOL}: before the run one bit of the file is flipped; the second
rank finds the checkpoint of another step; during the run no file can grow beyond the limit, the disk is taken to have
so much room, no save is hashed before the step is done, and what writes the second rank's tensors is killed.  Each rank
writes <run_dir>_outcome/RANK.txt: the error, or what was logged.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from megatron_lance.config.errors import UserError
from megatron_lance.config.loader import load_config

# megatron-core's checkpoint writer spawns a process that imports this file: heavy imports are inside the functions.


TRAIN_RUN = "megatron_lance.training.run"


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


@contextmanager
def trouble(limit: int | None, free: int | None) -> Iterator[None]:
    """A bound on the size of files, and a disk with little room; forked writers inherit the former."""
    before, usage = resource.getrlimit(resource.RLIMIT_FSIZE), shutil.disk_usage
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    if free is not None:
        shutil.disk_usage = lambda path: Usage(free, 0, free)  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        shutil.disk_usage = usage


@contextmanager
def held(metrics: Path, step: int | None) -> Iterator[None]:
    """Saves whose files are hashed only when a step stands in metrics.jsonl; a minute at most."""
    from megatron_lance.checkpoint import saver
    from megatron_lance.checkpoint.digests import digests_of

    def hash_later(*arguments: Any) -> dict[str, str]:
        end = time.monotonic() + 60
        while f'"step": {step},' not in metrics.read_text(encoding="utf-8"):
            if time.monotonic() > end:
                raise OSError(f"step {step} was not done while its save was under way")
            time.sleep(0.05)
        return digests_of(*arguments)

    with nullcontext() if step is None else patch.object(saver, "digests_of", hash_later):
        yield


@contextmanager
def astray(sees: int | None, kill: bool) -> Iterator[None]:
    """On the second rank: another checkpoint is found; what writes tensors is killed, as for want of memory."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_lance.checkpoint.manifest import find_checkpoint

    def killed(*arguments: Any, **named: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with ExitStack() as stack:
        if sees is not None and dist.get_rank() == 1:
            other = partial(replace, resume=sees)
            stack.enter_context(
                patch(f"{TRAIN_RUN}.find_checkpoint", lambda settings: find_checkpoint(other(settings)))
            )
        if kill and dist.get_rank() == 1:
            stack.enter_context(patch.object(FileSystemWriterAsync, "write_preloaded_data", killed))
        yield


def flip(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def attempt(job: dict[str, Any]) -> None:
    """Train, and write down how it ended."""
    import torch.distributed as dist

    from megatron_lance.parallel import groups
    from megatron_lance.training.run import train_run
    from megatron_lance.training.signals import StopRequest

    run = load_config([job["config"]], job["overrides"])
    if job["flip"] and dist.get_rank() == 0:
        flip(Path(job["flip"]))
    dist.barrier()
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    try:
        with (
            trouble(job["limit"], job["free"]),
            held(Path(run.training.run_dir) / "metrics.jsonl", job["hold"]),
            astray(job["sees"], job["kill"]),
            StopRequest(run.training.stop_after_minutes) as stop,
        ):
            train_run(run, stop)
    except UserError as error:
        log.write(f"ERROR {error}")
    logging.getLogger().removeHandler(handler)
    groups.leave()
    outcome = Path(f"{run.training.run_dir}_outcome")
    outcome.mkdir(exist_ok=True)
    (outcome / f"{dist.get_rank()}.txt").write_text(log.getvalue(), encoding="utf-8")


def main() -> None:
    """Run."""
    from megatron_lance.config.logs import set_up_logging
    from megatron_lance.config.schema import ParallelConfig
    from megatron_lance.parallel import groups

    set_up_logging(first_rank=True)
    groups.initialize(ParallelConfig(), seed=1)
    groups.leave()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        attempt(job)
    groups.destroy()


if __name__ == "__main__":
    main()
