"""The same batches on many layouts: `torchrun --nproc-per-node 8 tools/check_equivalence.py [--layout NAME ...]`.

Every layout trains two steps (all tasks, then a batch where one replica has no generation token, one no answer, one a
single noise sample) from the same weights, and loss, gradient norm, every parameter group's gradients and the updated
weights are compared with one rank.  The parallel state is initialised anew for each layout, on as many of the ranks as
it takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from megatron_lance.checkpoint.hf_lance import RandomSource
from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.logs import set_up_logging
from megatron_lance.config.schema import (
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_lance.config.validate import validate
from megatron_lance.objectives.losses import LossCounts
from megatron_lance.objectives.random_values import FilledPack
from megatron_lance.parallel import cpu_rehearsal
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.groups import Groups
from megatron_lance.parity.equivalence import (
    FEW,
    LAYOUTS,
    MODEL,
    ONE_RANK,
    TOKENIZER_SIZE,
    NamedLayout,
    StepResult,
    differences,
    global_batches,
)
from megatron_lance.profiling.provenance import provenance
from megatron_lance.training.gradients import public_gradients, public_weights
from megatron_lance.training.setup import Trainee, build
from megatron_lance.training.step import forward_backward
from megatron_lance.training.synthetic import micro_batches
from megatron_lance.training.update import update

TOLERANCE = {"float32": 1e-5, "bf16": 5e-2}
"""Largest allowed relative difference; in bf16 13 times its rounding unit 2^-8, as layouts round other partial sums."""
WEIGHT_TOLERANCE = {"float32": 1e-5, "bf16": 1e-1}
"""The same of updated weights; in bf16 more, as those that begin at zero are nothing but two updates of Adam, in which
small gradients count as much as large ones."""
LEARNING_RATE, ADAM_EPS = 1e-3, 1e-3  # so large an eps that the first update is smooth in the gradient


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", nargs="+", metavar="NAME", help=f"some of: {', '.join(LAYOUTS)} (default all)")
    parser.add_argument("--few", action="store_true", help=f"the layouts {', '.join(FEW)}")
    parser.add_argument("--precision", choices=sorted(TOLERANCE), default="float32")
    parser.add_argument("--attention", default="sdpa", help="attention backend (default sdpa), see ops/attention.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every difference there")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace, world_size: int) -> list[NamedLayout]:
    """The layouts to check.

    Raises:
        UserError: if one is unknown or takes more ranks than there are.
    """
    names = list(FEW) if arguments.few else arguments.layout or list(LAYOUTS)
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        raise UserError(f"--layout {' '.join(unknown)}: unknown; choose from {', '.join(LAYOUTS)}")
    chosen = [LAYOUTS[name] for name in names]
    most = max(chosen, key=lambda layout: layout.ranks)
    if most.ranks > world_size:
        raise UserError(
            f"--layout {most.name}: takes {most.ranks} ranks, there are {world_size}; start torchrun with "
            f"--nproc-per-node {most.ranks}"
        )
    return chosen


def _run_config(layout: NamedLayout, precision: str, attention: str, packs: int) -> RunConfig:
    parallel = ParallelConfig(**{"use_distributed_optimizer": False, "region_alignment": 4, **layout.parallel})
    run = RunConfig(
        model=replace(MODEL, attention_backend=attention),
        parallel=parallel,
        data=DataConfig(max_seconds_generation=0.1),
        objective=ObjectiveConfig(timestep_shift=2.0),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, min_lr=LEARNING_RATE, adam_eps=ADAM_EPS),
        training=TrainingConfig(precision=precision, global_batch_size=packs),
    )
    validate(run, layout.ranks)
    return run


def _step(packs: list[FilledPack], run: RunConfig, trainee: Trainee, groups: Groups) -> StepResult:
    """One step; gradients are read before they are clipped."""
    counts = LossCounts.of(f.pack for f in packs)
    trainee.scheduler.step(increment=1)
    own = forward_backward(trainee, micro_batches(packs, run, groups), counts, run.objective, groups, broken=0)
    whole = not run.parallel.use_distributed_optimizer
    gradients = public_gradients(trainee, run.model) if whole else {}
    done = update(trainee, own)
    norm = math.nan if done.skipped else done.norm
    return StepResult(done.losses.total, norm, done.losses.by_task, gradients, public_weights(trainee, run.model))


def _run(layout: NamedLayout, arguments: argparse.Namespace, store: Store, rank: int) -> list[StepResult]:
    """The steps of a layout on its ranks; nothing on the others."""
    if rank >= layout.ranks:
        return []
    on_cpu = cpu_rehearsal.start_if_needed()
    if not on_cpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=PrefixStore(layout.name, store),
        rank=rank,
        world_size=layout.ranks,
        timeout=timedelta(minutes=10),
    )
    batches = global_batches()
    run = _run_config(layout, arguments.precision, arguments.attention, len(next(iter(batches.values()))))
    groups = parallel_groups.initialize(run.parallel, seed=1)
    trainee = build(run, groups, TOKENIZER_SIZE, RandomSource(1, run.model))
    steps = [_step(packs, run, trainee, groups) for packs in batches.values()]
    parallel_groups.destroy()
    return steps


def _agrees(found: dict[str, float], precision: str) -> bool:
    bound = {"weights": WEIGHT_TOLERANCE[precision]}
    return all(value <= bound.get(name, TOLERANCE[precision]) for name, value in found.items())


def _line(name: str, found: dict[str, float], precision: str) -> str:
    groups = [key for key in found if key not in ("loss", "loss by task", "grad norm", "weights")]
    worst = max(groups, key=found.__getitem__, default=None)
    gradient = f"gradients {found[worst]:.1e} ({worst})" if worst else "gradients in shards"
    verdict = "ok  " if _agrees(found, precision) else "FAIL"
    return f"{verdict} {name:<28} loss {found['loss']:.1e}, weights {found['weights']:.1e}, {gradient}"


def main() -> int:
    """Compare every layout with one rank; 0 if all agree."""
    arguments = parse_arguments()
    set_up_logging(first_rank=False)
    chosen = _chosen(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(minutes=30)))
    precision = arguments.precision
    reference = _run(ONE_RANK, arguments, store, rank)
    results = {}
    for layout in chosen:
        steps = _run(layout, arguments, store, rank)
        if rank == 0:
            results[layout.name] = differences(steps, reference)
            print(_line(layout.name, results[layout.name], precision), flush=True)
    if rank == 0 and arguments.json is not None:
        record = {
            **provenance(),
            "ranks": world_size,
            "precision": precision,
            "tolerance": TOLERANCE[precision],
            "weight_tolerance": WEIGHT_TOLERANCE[precision],
            "losses": [step.loss for step in reference],
            "layouts": results,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    ok = all(_agrees(found, precision) for found in results.values())
    store.set(f"done {rank}", "1")
    if rank == 0:
        store.wait([f"done {r}" for r in range(world_size)], timedelta(minutes=30))
    return int(not ok)


if __name__ == "__main__":
    sys.exit(run_command("check_equivalence", main))
