"""Count what collectives move in a whole step on several layouts of four ranks, and print it beside the formulas."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_lance.checkpoint.hf_lance import RandomSource
from megatron_lance.config.schema import DataConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_lance.config.validate import validate
from megatron_lance.objectives.losses import LossCounts
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parity.equivalence import CAPACITY, LAYOUTS, MODEL, TOKENIZER_SIZE, global_batches
from megatron_lance.profiling.communication import CollectiveCounter
from megatron_lance.profiling.step_traffic import step_transfers
from megatron_lance.training.setup import build
from megatron_lance.training.step import forward_backward
from megatron_lance.training.synthetic import micro_batches
from megatron_lance.training.update import update

FOUR = ("tp2-pp2", "cp2-pp2", "dp4", "dp2-cp2", "pp2-vpp2-dp2", "tp2-cp2-full", "tp2-layernorm-mlp", "tp4", "pp4")
DEGREES = {"pp2-vpp2-dp2": "pp2-vpp2-dp2-overlap"}


def count(name: str) -> dict[str, Any]:
    """Counted and computed bytes of one rank by axis."""
    layout = LAYOUTS[DEGREES.get(name, name)]
    parallel = ParallelConfig(**{**layout.parallel, "region_alignment": 4})
    run = RunConfig(
        model=MODEL,
        parallel=parallel,
        data=DataConfig(max_seconds_generation=0.1, seq_length=CAPACITY),
        training=TrainingConfig(precision="bf16", global_batch_size=4),
    )
    validate(run, dist.get_world_size() if dist.is_initialized() else 4)
    groups = parallel_groups.initialize(parallel, seed=1)
    trainee = build(run, groups, TOKENIZER_SIZE, RandomSource(1, MODEL))
    packs = global_batches()["all tasks"]
    batches = micro_batches(packs, run, groups)
    counter = CollectiveCounter()
    with counter:
        of_rank = forward_backward(
            trainee, batches, LossCounts.of(p.pack for p in packs), run.objective, groups, broken=0
        )
        update(trainee, of_rank)
    world = dist.group.WORLD
    found = {
        "tp": counter.moved[parallel_state.get_tensor_model_parallel_group().group_name],
        "cp": counter.moved[parallel_state.get_context_parallel_group().group_name],
        # of two stages that talk one by one megatron-core sends one direction over the whole world's group
        "pp": counter.moved[parallel_state.get_pipeline_model_parallel_group().group_name]
        + (counter.moved[world.group_name] if world and parallel.virtual_pipeline_model_parallel_size else 0),
        "dp": counter.moved[parallel_state.get_data_parallel_group(with_context_parallel=True).group_name],
    }
    mean = [
        sum(values) / len(batches)
        for values in zip(*((b.region_rows[0], len(b.ce_rows)) for b in batches), strict=True)
    ]
    transfers = step_transfers(run, dist.get_world_size(), groups.pp_rank, und_rows=mean[0], ce_rows=mean[1])
    computed = {axis: sum(t.moved for t in transfers if t.axis == axis) for axis in found}
    parallel_groups.leave()
    own = {"rank": dist.get_rank(), "counted": found, "computed": computed}
    everyone: list[Any] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {"ranks": everyone}


def main() -> None:
    """Run."""
    results = {name: count(name) for name in FOUR}
    if dist.get_rank() == 0:
        sys.stdout.write(f"RESULTS {json.dumps(results)}\n")
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
