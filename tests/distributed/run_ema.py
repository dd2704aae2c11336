"""Exchange a model's weights for averaged ones and back, with and without overlapped gathers.

    torchrun --nproc-per-node 2 run_ema.py CONFIG OVERRIDES...

Every rank checks its own share, and that all ranks hold the same model.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from megatron_lance.checkpoint.hf_lance import RandomSource
from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.training.setup import Trainee, build


def weights(trainee: Trainee) -> torch.Tensor:
    """All of this rank's model, flat float32."""
    return torch.cat([p.detach().flatten().float() for stage in trainee.stages for p in stage.parameters()])


def check(run: RunConfig) -> None:
    """Put averages that differ from the weights, look, take them away, look."""
    groups = parallel_groups.initialize(run.parallel, seed=1)
    trainee = build(run, groups, 300, RandomSource(1, run.model))
    average = trainee.average
    assert average is not None
    held = sum(shard.data.numel() for shard in average.shards)
    assert held < 0.6 * weights(trainee).numel(), "a rank of two holds more than its share"
    for shard in average.shards:
        shard.data.mul_(2.0).add_(1.0)
    before, averages = weights(trainee), [shard.data.clone() for shard in average.shards]
    with average.applied():
        for shard, expected in zip(average.shards, averages, strict=True):
            found = shard.parameter.detach().flatten()[shard.start : shard.start + expected.numel()]
            assert torch.equal(found, expected.to(found.dtype))
        everyone = [torch.empty_like(before) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, weights(trainee))
        assert all(torch.equal(each, everyone[0]) for each in everyone)
        assert not torch.equal(everyone[0], before)
    assert torch.equal(weights(trainee), before)
    assert all(torch.equal(s.data, expected) for s, expected in zip(average.shards, averages, strict=True))
    parallel_groups.leave()


def main() -> None:
    """Run."""
    config, *overrides = sys.argv[1:]
    check(load_config([config], overrides))
    bf16 = ["training.precision=bf16", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    check(load_config([config], [*overrides, *bf16]))
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
