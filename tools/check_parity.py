#!/usr/bin/env python
"""Compare this trainer with golden cases of the public reference, on any layout.

    torchrun --nproc-per-node 4 tools/check_parity.py --golden DIR --tp 2 --pp 2

Prints a line per case with the largest relative difference per quantity and exits 1 if one exceeds its tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_lance.checkpoint.hf_lance import TensorSource
from megatron_lance.config.errors import run_command
from megatron_lance.config.logs import set_up_logging
from megatron_lance.config.schema import DataConfig, OpsConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_lance.config.validate import validate
from megatron_lance.objectives.losses import LossCounts
from megatron_lance.packing.layout import PADDING, Layout
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.segment import Expert
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.dispatch import rank_batch
from megatron_lance.parallel.groups import Groups
from megatron_lance.parity.compare import Difference, Probe, activations, gradients, structure
from megatron_lance.parity.golden import GoldenCase, GoldenConfig, case_files, load_case, load_config
from megatron_lance.parity.sampling import check_sampling, sampling_files
from megatron_lance.sampling.passes import ModelPasses
from megatron_lance.sampling.velocity import ModelVelocity
from megatron_lance.training.gradients import public_gradients
from megatron_lance.training.setup import Trainee, build
from megatron_lance.training.step import forward_backward

ALIGNMENT = 4


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--golden", type=Path, metavar="DIR", help="folder of training cases, case*.json")
    what.add_argument("--sampling", type=Path, metavar="DIR", help="folder of sampling cases, sampling_*.json")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel ranks")
    parser.add_argument("--cp", type=int, default=1, help="context-parallel ranks")
    parser.add_argument("--vpp", type=int, default=None, help="model chunks per pipeline rank")
    parser.add_argument("--attention", default="sdpa", help="attention backend (default sdpa), see ops/attention.py")
    parser.add_argument("--mape", default="auto", help="QK-norm and rotation: auto, fused or reference")
    parser.add_argument("--uncached", action="store_true", help="--sampling without the cache of the clean context")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every difference there")
    parser.add_argument("--verbose", action="store_true", help="a line per quantity")
    return parser.parse_args()


def check_case(case: GoldenCase, config: GoldenConfig, trainee: Trainee, groups: Groups) -> list[Difference]:
    """Run one case forward and backward on this layout and compare."""
    layout = Layout.build(case.pack, groups.cp, groups.tp, ALIGNMENT)
    batch = rank_batch(
        case.pack,
        layout,
        case.tokens,
        case.visuals,
        case.noise,
        mape=Mape(config.model.mape),
        mape_step=config.model.mape_step,
        cp_rank=groups.cp_rank,
        tp_rank=groups.tp_rank,
    ).to(groups.device, torch.float32)
    copies = 2 * groups.pp if trainee.config.virtual_pipeline_model_parallel_size else 1
    counts = LossCounts.of([case.pack] * copies)
    region = layout.region_tokens(Expert.UND, groups.cp_rank)
    ce_tokens = region[batch.ce_rows.cpu().numpy()]
    ce_tokens[batch.ce_weights.cpu().numpy() == 0] = PADDING
    probe = Probe(layout, groups.cp_rank, groups.tp_rank)
    with probe.watch(trainee.stages, ce_tokens):
        forward_backward(trainee, [batch] * copies, counts, config.objective, groups, broken=0)
    return [
        *structure(case, config.model.latent_position_size),
        *activations(case, probe.collect(), config.model.num_layers),
        *gradients(case, public_gradients(trainee, config.model)),
    ]


def _report(name: str, differences: list[Difference], verbose: bool) -> None:
    bad = [d for d in differences if not d.ok]
    exact = [d for d in differences if d.tolerance == 0]
    parts = [f"exact {sum(d.ok for d in exact)}/{len(exact)}"]
    parts += [f"{d.quantity} {d.value:.1e}" for d in differences if d.tolerance > 0 or not d.ok]
    print(f"{'FAIL' if bad else 'ok  '} {name}: " + ", ".join(parts))
    for d in differences if verbose else bad:
        print(f"     {'ok  ' if d.ok else 'FAIL'} {d.quantity}: {d.value:.3e} (tolerance {d.tolerance:.0e})")


def _start(arguments: argparse.Namespace, config: GoldenConfig, folder: Path) -> tuple[Trainee, Groups]:
    """Join the groups and build the golden model on this layout."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        context_parallel_size=arguments.cp,
        virtual_pipeline_model_parallel_size=arguments.vpp,
        use_distributed_optimizer=False,
    )
    run = RunConfig(
        model=replace(config.model, attention_backend=arguments.attention),
        ops=OpsConfig(mape=arguments.mape),
        parallel=parallel,
        data=DataConfig(max_seconds_generation=0.1),
        training=TrainingConfig(precision="float32", global_batch_size=arguments.pp),
    )
    validate(run, int(os.environ.get("WORLD_SIZE", "1")))
    source = TensorSource(load_file(folder / "weights.safetensors"), config.model)
    groups = parallel_groups.initialize(parallel, seed=1)
    return build(run, groups, config.tokenizer_size, source), groups


def main() -> int:
    """Check all cases of a folder; 0 if every quantity is within its tolerance."""
    arguments = parse_arguments()
    set_up_logging(first_rank=False)
    folder = arguments.golden or arguments.sampling
    config = load_config(folder)
    files = case_files(folder) if arguments.golden else sampling_files(folder)
    trainee, groups = _start(arguments, config, folder)
    velocity = ModelVelocity(ModelPasses(trainee.stages, config.model, groups, ALIGNMENT), not arguments.uncached)
    results: dict[str, list[Difference]] = {}
    for path in files:
        try:
            if arguments.golden:
                differences = check_case(load_case(path, config), config, trainee, groups)
            else:
                differences = check_sampling(path, config, velocity)
        except (ValueError, KeyError) as error:  # raised while reading, by all ranks alike
            differences = [Difference(f"unreadable: {error!r}", float("inf"), 0.0)]
        results[path.stem] = differences
        if dist.get_rank() == 0:
            _report(path.stem, differences, arguments.verbose)
    if arguments.json is not None and dist.get_rank() == 0:
        layout = {name: getattr(arguments, name) for name in ("tp", "pp", "cp", "vpp", "attention")}
        cases = {name: [asdict(d) for d in differences] for name, differences in results.items()}
        record = {"layout": layout, "torch": torch.__version__, "device": str(groups.device), "cases": cases}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.flush()
    dist.barrier()  # a launcher ends the other ranks when one ends with 1
    parallel_groups.destroy()
    return int(not all(d.ok for differences in results.values() for d in differences))


if __name__ == "__main__":
    sys.exit(run_command("check_parity", main))
