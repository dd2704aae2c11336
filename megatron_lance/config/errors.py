"""Errors that are the user's to mend.

Station: anywhere before or during a run.  A command line prints the message as one line and ends with the error's exit
code; everything else is a defect of the program and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend; the message names field, value, rule and remedy."""

    exit_code = 2
    """Configuration, tokenizer, checkpoint or pack index."""


class DataError(UserError):
    """The data set itself is unusable."""

    exit_code = 3


class NonFiniteError(UserError):
    """Loss or gradients were not finite in too many steps in a row."""

    exit_code = 4


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
        if distributed is not None and distributed.is_initialized():
            sys.stderr.write(f"{name}: rank {distributed.get_rank()}: error: {error}\n")
        elif os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{name}: error: {error}\n")
        return error.exit_code
