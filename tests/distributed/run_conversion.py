"""Take a checkpoint through other layouts.

    torchrun --nproc-per-node N run_conversion.py CHECKPOINT OUT NAME=tensor_model:2,pipeline_model:2 ...

For each layout the model is loaded and saved again on these ranks, as OUT/NAME.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

# megatron-core's checkpoint writer spawns a process that imports this file: heavy imports are inside the functions.


def resave(checkpoint_folder: Path, out: Path, degrees: dict[str, int]) -> None:
    """Load on a layout, save on it."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_lance.checkpoint.digests import digests_of, written_by
    from megatron_lance.checkpoint.everywhere import together
    from megatron_lance.checkpoint.manifest import open_checkpoint
    from megatron_lance.checkpoint.store import load_model
    from megatron_lance.config.loader import from_dict
    from megatron_lance.config.schema import ParallelConfig
    from megatron_lance.model.lance_model import build_stages
    from megatron_lance.model.transformer_config import transformer_config
    from megatron_lance.parallel import groups

    checkpoint = open_checkpoint(checkpoint_folder)
    run = from_dict(checkpoint.manifest.config, "checkpoint")
    parallel = ParallelConfig(
        tensor_model_parallel_size=degrees.get("tensor_model", 1),
        pipeline_model_parallel_size=degrees.get("pipeline_model", 1),
    )
    groups.initialize(parallel, seed=1)
    config = transformer_config(run.model, parallel, run.training.precision)
    stages = build_stages(config, run.model, run.model.vocab_size)
    load_model(checkpoint, stages)
    if dist.get_rank() == 0:
        out.mkdir(parents=True)
    dist.barrier()
    tree = {f"model{i}": stage.sharded_state_dict() for i, stage in enumerate(stages)}
    dist_checkpointing.save(tree, str(out))
    dist.barrier()
    own = together(out, lambda: digests_of(out, written_by(out, dist.get_rank())))
    if dist.get_rank() == 0:
        files = {name: (out / name).stat().st_size for each in own for name in each}
        manifest = replace(checkpoint.manifest, files=files, world_size=dist.get_world_size())
        manifest.write(out, {name: digest for each in own for name, digest in each.items()})
    dist.barrier()
    groups.leave()


def main() -> None:
    """Run."""
    from megatron_lance.parallel import groups

    checkpoint, out, *layouts = sys.argv[1:]
    for layout in layouts:
        name, _, degrees = layout.partition("=")
        pairs = (part.split(":") for part in degrees.split(",") if part)
        resave(Path(checkpoint), Path(out) / name, {key: int(value) for key, value in pairs})
    groups.destroy()


if __name__ == "__main__":
    main()
