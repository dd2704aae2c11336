"""Train one step on several layouts on these ranks and write down what each rank holds, and its peak.

Arguments: the file to write, a configuration, then one text of overrides per layout.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lance.checkpoint.hf_lance import RandomSource
from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.objectives.losses import LossCounts
from megatron_lance.objectives.random_values import FilledPack
from megatron_lance.packing.sample import Pack
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parity.equivalence import all_tasks
from megatron_lance.profiling.live_bytes import LiveBytes
from megatron_lance.profiling.memory import PackLoad
from megatron_lance.training.setup import Trainee, build
from megatron_lance.training.step import forward_backward
from megatron_lance.training.synthetic import micro_batches
from megatron_lance.training.update import update

TOKENIZER_SIZE = 300


def packs_of(run: RunConfig) -> list[FilledPack]:
    """A global batch of one pack: passes that wait keep the same, so that what is held is that of one load."""
    sizes = {"hidden": run.model.hidden_size, "channels": run.model.latent_channels, "vocabulary": TOKENIZER_SIZE}
    samples, *_ = all_tasks()
    pack = Pack(tuple(samples), run.data.seq_length)
    return [FilledPack.random(pack, **sizes, seed=1) for _ in range(run.training.global_batch_size)]


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def held(trainee: Trainee) -> dict[str, int]:
    """What this rank holds after a step."""
    parameters = [p for stage in trainee.stages for p in stage.parameters()]
    states, mains = [], []
    for part in trainee.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            mains += [p for p in group["params"] if trainee.config.bf16]
        for state in part.optimizer.state.values():
            states += [t for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 1]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "weight_bytes": _bytes(parameters),
        "gradient_bytes": _bytes([b.grad_data for chunk in trainee.chunks for b in chunk.buffers]),
        "optimizer_bytes": _bytes(states) + _bytes(mains),
    }


def measure(config: str, overrides: list[str]) -> list[dict[str, Any]]:
    """What every rank holds under one layout."""
    run = load_config([config], overrides)
    groups = parallel_groups.initialize(run.parallel, seed=1)
    trainee = build(run, groups, TOKENIZER_SIZE, RandomSource(1, run.model))
    packs = packs_of(run)
    batches = micro_batches(packs, run, groups)
    counts = LossCounts.of(p.pack for p in packs)
    waiting = [0]

    def on_host() -> int:
        waiting.append(sum(stage.offload.host_bytes for stage in trainee.stages if stage.offload is not None))
        return waiting[-1]

    with LiveBytes(on_host) as counter:
        of_rank = forward_backward(trainee, batches, counts, run.objective, groups, broken=0)
    update(trainee, of_rank)
    load = asdict(PackLoad.of(batches))
    own = {"pp_rank": groups.pp_rank, "peak": counter.peak, "host": max(waiting), "load": load, **held(trainee)}
    found: list[Any] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    parallel_groups.leave()
    return found


def main() -> None:
    """Run."""
    out, config, *layouts = sys.argv[1:]
    counts = [measure(config, layout.split()) for layout in layouts]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(counts), encoding="utf-8")
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
