"""The training entry.

    torchrun --nproc-per-node 4 -m megatron_lance.training.train --config FILE [key=value ...]

Station: command line -> configuration -> run.  Everything that can be wrong in a configuration ends with one clear
line and a non-zero exit code before any process group exists; torch and megatron-core are imported only then.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.loader import dump_yaml, load_config
from megatron_lance.config.logs import set_up_logging
from megatron_lance.config.schema import ParallelConfig
from megatron_lance.config.validate import validate
from megatron_lance.training.signals import StopRequest


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="megatron_lance.training.train", description="Train a Lance model.")
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML file; later ones win")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="print layout, memory and the first pack and stop")
    ranks = "ranks to describe; default: those of torchrun, without it those of one replica"
    parser.add_argument("--world-size", type=int, metavar="N", help=ranks)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.train_iters=20")
    return parser.parse_intermixed_args(arguments)


def _ranks_of_one_replica(parallel: ParallelConfig) -> int:
    degrees = parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.pipeline_model_parallel_size
    return max(math.prod(degrees), 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse_arguments(arguments)
    first_rank, describes = os.environ.get("RANK", "0") == "0", options.print_config or options.dry_run
    if options.world_size is not None and not describes:
        raise UserError("--world-size: describes a run; add --dry-run or --print-config, or start that many ranks")
    set_up_logging(first_rank)
    config = load_config(options.config, options.overrides)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if options.world_size is not None:
        world_size = options.world_size
    elif describes and "WORLD_SIZE" not in os.environ:
        world_size = _ranks_of_one_replica(config.parallel)
    validate(config, world_size)
    if options.print_config:
        sys.stdout.write(dump_yaml(config) if first_rank else "")
        return 0
    if options.dry_run:
        from megatron_lance.training.run import describe  # heavy: only once the configuration stands

        if first_rank:
            sys.stdout.write(describe(config, world_size) + "\n")
        return 0
    with StopRequest(config.training.stop_after_minutes) as stop:  # from the begin: who is told early still saves
        from megatron_lance.training.run import start

        start(config, stop)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("train", main))
