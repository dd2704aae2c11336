"""Start several real processes over gloo.

`torchrun` starts them as a user does.  `on_ranks` forks them from a process that has already imported what they need,
which takes each of them seconds on a small machine; all else is alike: environment, the agent's store, arguments, and
that the others are ended when one fails.  Tests of what a launcher itself does or says take `torchrun`.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
import torch.distributed as dist

from tests.shared import REPOSITORY

TIMEOUT_SECONDS = 300
_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["megatron_lance.training.run", "megatron_lance.parity.equivalence"])


def torchrun(processes: int, *arguments: str, exit_code: int = 0) -> str:
    """Run a script (or `-m module`) on `processes` ranks of this machine.

    Args:
        processes: ranks.
        arguments: of torch.distributed.run, the script first.
        exit_code: that the run must end with.

    Returns:
        stdout and stderr together.

    Raises:
        AssertionError: with the output, if the run ends otherwise or does not end in TIMEOUT_SECONDS.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    run = subprocess.Popen(
        [*command, *arguments],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that a run that hangs can be ended with all its ranks
    )
    try:
        output, _ = run.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        output, _ = run.communicate()
        raise AssertionError(f"{arguments} did not end in {TIMEOUT_SECONDS} s:\n{output}") from None
    assert run.returncode == exit_code, f"{arguments} ended with {run.returncode}, not {exit_code}:\n{output}"
    return output


def on_ranks(processes: int, script: str | Path, *arguments: str, exit_code: int = 0) -> str:
    """Run a script on `processes` forked ranks of this machine.

    Args:
        processes: ranks.
        script: file, as a path from the repository's root.
        arguments: of the script.
        exit_code: of the first rank that ends with another one than 0.

    Returns:
        stdout and stderr of all ranks together.

    Raises:
        AssertionError: with the output, if the run ends otherwise or does not end in TIMEOUT_SECONDS.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "forked",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as file:
        started = [
            _FORKS.Process(
                target=_rank,
                args=([str(script), *arguments], {**common, "RANK": str(i), "LOCAL_RANK": str(i)}, file.name),
            )
            for i in range(processes)
        ]
        for process in started:
            process.start()
        code = _end_of(started)
        output = file.read()
    what = f"{script} {' '.join(arguments)}"
    assert code is not None, f"{what} did not end in {TIMEOUT_SECONDS} s:\n{output}"
    assert code == exit_code, f"{what} ended with {code}, not {exit_code}:\n{output}"
    return output


def _end_of(started: list[ForkServerProcess]) -> int | None:
    """Exit code of the first rank that fails, 0 if none does, None if they do not end; nothing runs afterwards."""
    end, running, code = time.monotonic() + TIMEOUT_SECONDS, {p.sentinel: p for p in started}, 0
    while running and not code:
        done = wait(list(running), timeout=max(0.0, end - time.monotonic()))
        if not done:
            break
        for process in [running.pop(sentinel) for sentinel in done if isinstance(sentinel, int)]:
            process.join()
            code = code or process.exitcode or 0
    late = bool(running) and not code
    for process in running.values():
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # a rank leads the processes it has started
        process.kill()  # it may not lead any yet
        process.join()
    return None if late else code


def _rank(command: list[str], environment: dict[str, str], output: str) -> None:
    """One rank, in a process of its own."""
    os.setsid()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")
