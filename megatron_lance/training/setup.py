"""Build what a run trains: stages, data-parallel wrappers, optimizer, learning-rate schedule.

Station: configuration and groups -> [model, optimizer, scheduler] -> step.  Everything that megatron-core has is
megatron-core's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import optimizer as core_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from megatron_lance.checkpoint.hf_lance import FolderSource, RandomSource, WeightSource, load_weights
from megatron_lance.checkpoint.manifest import Checkpoint, checkpoint_at, names_checkpoint
from megatron_lance.checkpoint.store import check_model, load_model
from megatron_lance.config.schema import ParallelConfig, RunConfig
from megatron_lance.model.freeze import freeze
from megatron_lance.model.lance_model import LanceModel, build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.parallel.groups import Groups
from megatron_lance.training.clock import StepClock
from megatron_lance.training.ema import WeightAverage
from megatron_lance.training.gauges import Gauges

logger = logging.getLogger(__name__)

BUCKET_PARAMETERS = 40_000_000
"""Parameters whose gradients are reduced together under overlap.  megatron-core's own size grows with the number of
replicas, so that a checkpoint with the optimizer's buckets would not load on another number."""


@dataclass(frozen=True)
class Trainee:
    """The model of this rank and what updates it.

    Attributes:
        config: megatron-core's configuration, shared by all parts.
        stages: the bare model chunks of this pipeline rank.
        chunks: the same, wrapped for data parallelism.
        optimizer: over all chunks.
        scheduler: sets the learning rate of every step.
        average: of the weights; None without training.ema_decay.
        clock: of forward and backward.
        gauges: gradient norms per expert, and memory.
    """

    config: TransformerConfig
    stages: list[LanceModel]
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    average: WeightAverage | None
    clock: StepClock
    gauges: Gauges

    @contextmanager
    def at_rest(self, averaged: bool) -> Iterator[None]:
        """The whole model for passes without gradients; a collective of replicas.

        Weights that an overlapped gather would bring during the next forward pass are fetched before, so afterwards
        ranks may run passes that others do not.  Linears compute in the precision of their weights, so FP8's history
        of values sees nothing of it.  Training goes on as if nothing had been.

        Args:
            averaged: take the averaged weights meanwhile.
        """
        fp8, self.config.fp8 = self.config.fp8, None
        for stage in self.stages:
            stage.eval()
        if averaged:
            if self.average is None:
                raise ValueError("there are no averaged weights; set training.ema_decay")
            with self.average.applied():
                yield
        else:
            gathers = self.chunks[0].ddp_config.overlap_param_gather
            for chunk in self.chunks if gathers else ():
                chunk.start_param_sync(force_sync=True)
            yield
        self.config.fp8 = fp8
        for stage in self.stages:
            stage.train()


def _finalize(clock: StepClock, chunks: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    """megatron-core's gradient finalisation without its division: the loss is already divided by global counts."""
    clock.gradients_complete()
    finalize_model_grads(chunks, num_tokens=None, **kwargs)


def _wrap(
    config: TransformerConfig, parallel: ParallelConfig, stages: Sequence[LanceModel]
) -> list[DistributedDataParallel]:
    """Data-parallel wrappers that sum gradients in float32."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=BUCKET_PARAMETERS if parallel.overlap_grad_reduce else None,
    )
    return [
        DistributedDataParallel(config, ddp, stage, disable_bucketing=index > 0) for index, stage in enumerate(stages)
    ]


def _connect_schedule(
    config: TransformerConfig, parallel: ParallelConfig, chunks: Sequence[Any], clock: StepClock
) -> None:
    """Tell megatron-core's schedules how gradients are finalised and when their reduction may start.

    Overlapped parameter gathers need nothing here: each bucket is awaited in the forward hook of its module.
    """
    config.finalize_model_grads_func = partial(_finalize, clock)
    if parallel.overlap_grad_reduce:
        waits = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = waits[0] if len(waits) == 1 else waits


def optimizer_in_use(adam: type | None = None) -> str:
    """Which Adam megatron-core has found, in its order of preference: TransformerEngine's, apex's, torch's.

    Only NVIDIA's apex has the module amp_C; another package of that name on PyPI has no optimizer.

    Args:
        adam: the class that it took; None: that of this process.
    """
    adam = adam or core_optimizer.Adam
    names = {"transformer_engine": "FusedAdam of TransformerEngine", "apex": "FusedAdam of apex"}
    return names.get(adam.__module__.split(".")[0], "Adam of torch")


def _optimizer(run: RunConfig, config: TransformerConfig, chunks: list[Any]) -> MegatronOptimizer:
    settings = run.optimizer
    fusion = "added up by the linears" if config.gradient_accumulation_fusion else "added up by megatron-core"
    logger.info("optimizer: %s; gradients of weights: %s", optimizer_in_use(), fusion)
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=run.parallel.use_distributed_optimizer,
            overlap_param_gather=run.parallel.overlap_param_gather,
        ),
        chunks,
        use_gloo_process_groups=False,
    )


def _scheduler(run: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    settings = run.optimizer
    decay_iters = settings.lr_decay_iters if settings.lr_decay_iters is not None else run.training.train_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=decay_iters,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay_iters,
        wd_incr_style="constant",
    )


def weight_source(run: RunConfig) -> WeightSource | Checkpoint:
    """Where initial weights come from: a folder in the public layout, a checkpoint, or (seed, parameter name).

    Raises:
        UserError: if the weights do not fit the model.
    """
    folder = run.training.init_from
    if not folder:
        return RandomSource(run.training.seed, run.model)
    if names_checkpoint(Path(folder)):
        checkpoint = checkpoint_at(Path(folder))
        check_model(checkpoint, run.model)
        return checkpoint
    return FolderSource(folder, run.model, f"training.init_from {folder!r}")


def build(run: RunConfig, groups: Groups, tokenizer_size: int, source: WeightSource | Checkpoint) -> Trainee:
    """Build and initialise what this rank trains.

    Args:
        run: the whole configuration.
        groups: degrees and ranks.
        tokenizer_size: ids the tokenizer uses.
        source: initial weights.
    """
    config = transformer_config(run.model, run.parallel, run.training.precision, run.fp8)
    stages = build_stages(config, run.model, tokenizer_size, run.ops.mape)
    if isinstance(source, Checkpoint):
        load_model(source, stages)
    else:
        load_weights(stages, source, run.model, tp_rank=groups.tp_rank, tp=groups.tp)
    freeze(stages, run.training.freeze)
    chunks = _wrap(config, run.parallel, stages)
    clock = StepClock(groups.device)
    _connect_schedule(config, run.parallel, chunks, clock)
    optimizer = _optimizer(run, config, list(chunks))
    decay = run.training.ema_decay
    average = WeightAverage(optimizer, chunks, decay) if decay else None
    gauges = Gauges(optimizer, stages)
    return Trainee(config, stages, chunks, optimizer, _scheduler(run, optimizer), average, clock, gauges)
