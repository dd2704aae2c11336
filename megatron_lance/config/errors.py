"""Errors that are the user's to mend, and the codes that programs end with.

Station: anywhere before or during a run.  A command line prints the message as one line and ends with the error's exit
code; everything else is a defect of the program and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import IntEnum


class ExitCode(IntEnum):
    """What a program ends with.

    Anything else, 1 above all, is a defect or a process that was killed.  torchrun itself ends with 1 whatever its
    ranks ended with; the last line of a run's events.jsonl has the code.
    """

    FINISHED = 0
    CONFIG = 2  # configuration, tokenizer, checkpoint or pack index
    DATA = 3  # the data set as a whole
    NON_FINITE = 4  # loss or gradients not finite in too many steps, or one loss spike after another
    HANG = 5  # a rank made no progress
    STOPPED = 6  # by a signal or the clock, after a checkpoint: start again with training.resume=auto


class UserError(ValueError):
    """Something the user can mend; the message names field, value, rule and remedy."""

    exit_code = ExitCode.CONFIG


class DataError(UserError):
    """The data set itself is unusable."""

    exit_code = ExitCode.DATA


class NonFiniteError(UserError):
    """Loss or gradients were not finite in too many steps in a row, or the loss rose again and again."""

    exit_code = ExitCode.NON_FINITE


class Stopped(UserError):
    """The run was asked to stop and has saved; no error, but not finished either.  The same on every rank."""

    exit_code = ExitCode.STOPPED


def run_command(name: str, body: Callable[[], int]) -> int:
    """Run a command line; a UserError becomes one line on stderr and its exit code.

    Before the process group exists all ranks meet the same error and the first one says it; later each says its own.

    Args:
        name: of the command, said before the message.
        body: does the work and returns the exit code.
    """
    try:
        return body()
    except UserError as error:
        distributed = sys.modules.get("torch.distributed")
        if isinstance(error, Stopped):
            sys.stderr.write(f"{name}: {error}\n" if os.environ.get("RANK", "0") == "0" else "")
        elif distributed is not None and distributed.is_initialized():
            sys.stderr.write(f"{name}: rank {distributed.get_rank()}: error: {error}\n")
        elif os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{name}: error: {error}\n")
        return error.exit_code
