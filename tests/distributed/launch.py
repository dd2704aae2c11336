"""Start several real processes over gloo, as a user does with torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.shared import REPOSITORY

TIMEOUT_SECONDS = 300


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
