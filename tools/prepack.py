"""Write the pack index of a configuration: `python tools/prepack.py --config FILE [key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from dataclasses import replace

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.loader import load_config
from megatron_lance.config.validate import validate
from megatron_lance.data.prepack import prepack


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML file; later ones win")
    parser.add_argument("--force", action="store_true", help="overwrite the pack index")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that probe media (default: all cores)",
    )
    parser.add_argument(
        "--held-out", action="store_true", help="plan the rows of data.validation_fraction, in validation.pack_index"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.seq_length=50000")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = load_config(args.config, args.overrides)
    parallel = config.parallel
    one_replica = (
        parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
    )
    validate(config, one_replica)
    training = config.training
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1; give the number of processes")
    data = config.data
    if args.held_out:
        if not config.validation.pack_index:
            raise UserError("validation.pack_index '': is not set; give a folder, e.g. validation.pack_index=PATH")
        facts = data.facts or (f"{data.pack_index}.facts" if data.pack_index else "")
        data = replace(data, pack_index=config.validation.pack_index, facts=facts)
    index = prepack(
        data,
        config.model,
        training.seed,
        training.global_batch_size,
        args.force,
        progress=not args.quiet,
        workers=args.workers,
        held_out=args.held_out,
    )
    counts = index.counts
    fill = counts["tokens"] / (counts["packs"] * index.capacity)
    print(
        f"{index.folder}: {counts['packs']} packs, {counts['samples']} samples, {counts['tokens']} tokens, "
        f"fill {fill:.1%}, unusable rows {counts['unusable']}, substituted samples {counts['substituted']}, "
        f"hash {index.hash}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command("prepack", main))
