"""Feed packs to these ranks, all of one replica, and write down what each of them got.

Arguments: the folder to write to, then configurations.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.groups import Groups
from megatron_lance.training.feed import Feed


def collect(run: RunConfig, groups: Groups, step: int) -> dict[str, Any]:
    """Encodings of all packs of the index, and what a step trains on."""
    feed = Feed(run, groups, Tokenizer(run.data.tokenizer))
    packs = [feed.index.pack(number) for number in range(len(feed.index))]
    visuals = feed.encoder.encode(packs, feed.read(packs, feed.reader).media)
    inputs = feed.step(step)
    return {
        "visuals": [(v.vit, v.latents, v.valid) for v in visuals],
        "named": list(feed.encoder.broken),
        "weights": [(float(b.ce_weights.sum()), float(b.velocity_weights.sum())) for b in inputs.batches],
        "counts": (inputs.counts.ce, inputs.counts.velocity),
        "broken": inputs.broken,
    }


def main() -> None:
    """Run."""
    out, step, *configs = sys.argv[1:]
    degree = f"parallel.context_parallel_size={os.environ['WORLD_SIZE']}"
    runs = [load_config([config], [degree]) for config in configs]
    groups = parallel_groups.initialize(runs[0].parallel, seed=1)
    torch.save([collect(run, groups, int(step)) for run in runs], Path(out) / f"rank{dist.get_rank()}.pt")
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
