"""Process groups in one process: what a run leaves behind."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lance.checkpoint.hf_lance import RandomSource
from megatron_lance.config.schema import DataConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_lance.parallel import groups
from megatron_lance.training.setup import build
from tests.unit.tiny_model import TINY, TOKENIZER_SIZE, one_rank

TASKS = Path("/proc/self/task")


def gloo_loops() -> int:
    """Threads that run collectives of gloo, two per group."""
    return sum(file.read_text().strip() == "pt_gloo_runloop" for file in TASKS.glob("*/comm"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts threads of gloo; NCCL serves here")
@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads in /proc, which this system lacks")
def test_groups_of_layouts_one_after_another_do_not_add_up() -> None:
    with one_rank():
        first = gloo_loops()
        for _ in range(3):
            groups.leave()
            groups.initialize(ParallelConfig(), seed=1)
        assert dist.is_initialized() and gloo_loops() == first > 1


@pytest.mark.parametrize("overlap", [False, True])
def test_a_model_that_nobody_uses_any_more_is_let_go(overlap: bool) -> None:
    """megatron-core's hooks, buffers and configuration hold one another; the garbage collector must see the ring.

    It does not where the configuration has a method of a float32 optimizer with shards, such as scale_loss.
    """
    run = RunConfig(
        model=TINY,
        parallel=ParallelConfig(overlap_grad_reduce=overlap, overlap_param_gather=overlap),
        optimizer=OptimizerConfig(),
        data=DataConfig(seq_length=64),
        training=TrainingConfig(precision="float32", global_batch_size=1),
    )
    with one_rank() as own:
        trainee = build(run, own, TOKENIZER_SIZE, RandomSource(1, TINY))
        chunk = weakref.ref(trainee.chunks[0])
        del trainee
        gc.collect()
        assert chunk() is None
