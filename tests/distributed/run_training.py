"""Train several times in a row on the same ranks; starting processes takes longer than these small runs.

Arguments: a configuration, then one text of overrides per training.
"""

from __future__ import annotations

import os
import sys

from megatron_lance.config.loader import load_config
from megatron_lance.config.validate import validate

# megatron-core's checkpoint writer spawns a process that imports this file: heavy imports are inside the function.


def main() -> None:
    """Run."""
    from megatron_lance.parallel import groups as parallel_groups
    from megatron_lance.training.run import train_run
    from megatron_lance.training.signals import StopRequest

    config, *trainings = sys.argv[1:]
    for overrides in trainings:
        run = load_config([config], overrides.split())
        validate(run, int(os.environ["WORLD_SIZE"]))
        with StopRequest(run.training.stop_after_minutes) as stop:
            train_run(run, stop)
        parallel_groups.leave()
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
