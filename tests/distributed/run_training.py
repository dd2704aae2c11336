"""Train several times in a row on the same ranks, each time through the entry of the command line.

Arguments: of each training, as one text.  Starting processes takes longer than these small runs.
"""

from __future__ import annotations

import shlex
import sys

from megatron_lance.training.train import main

if __name__ == "__main__":
    for line in sys.argv[1:]:
        if main(shlex.split(line)) != 0:
            sys.exit(f"{line}: did not end with 0")
