"""Write the pack index of a configuration: `python tools/prepack.py --config FILE [key=value ...]`."""

from __future__ import annotations

import argparse
import logging
import sys

from megatron_lance.config.errors import run_command
from megatron_lance.config.loader import load_config
from megatron_lance.config.validate import validate
from megatron_lance.data.prepack import prepack


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML file; later ones win")
    parser.add_argument("--force", action="store_true", help="overwrite the pack index")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.seq_length=50000")
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = load_config(args.config, args.overrides)
    parallel = config.parallel
    one_replica = (
        parallel.tensor_model_parallel_size * parallel.context_parallel_size * parallel.pipeline_model_parallel_size
    )
    validate(config, one_replica)
    index = prepack(config.data, config.model, config.training.seed, args.force, progress=not args.quiet)
    counts = index.counts
    fill = counts["tokens"] / (counts["packs"] * index.capacity)
    print(
        f"{index.folder}: {counts['packs']} packs, {counts['samples']} samples, {counts['tokens']} tokens, "
        f"fill {fill:.1%}, unusable rows {counts['unusable']}, hash {index.hash}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command("prepack", main))
