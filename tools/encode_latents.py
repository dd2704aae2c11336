"""Encode the media of a pack index once: `python tools/encode_latents.py --config FILE data.encoding_cache=FOLDER`.

With torchrun, ranks share the packs out; each encodes on its own GPU.  May be stopped and started again: what is in the
cache is not encoded a second time.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.loader import load_config
from megatron_lance.config.logs import set_up_logging
from megatron_lance.config.validate import validate


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="YAML file; later ones win")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example data.encoding_cache=FOLDER")
    args = parser.parse_intermixed_args()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    set_up_logging(rank == 0)
    config = load_config(args.config, args.overrides)
    parallel = config.parallel
    degrees = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    validate(config, degrees[0] * degrees[1] * degrees[2])
    if not config.data.encoding_cache:
        raise UserError("data.encoding_cache '': is not set; give the folder to write, e.g. data.encoding_cache=PATH")
    from megatron_lance.encoders.offline import encode_index  # heavy: only once the configuration stands

    done = encode_index(config, rank, ranks, progress=rank == 0 and not args.quiet)
    print(
        f"{config.data.encoding_cache}: {done.encoded} encoded, {done.known} were there, {done.broken} broken"
        + (f" (rank {rank} of {ranks})" if ranks > 1 else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command("encode_latents", main))
