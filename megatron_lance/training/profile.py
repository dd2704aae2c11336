"""Measure steps of a configuration on any layout: times, parts, memory, work, of every rank.

Station: configuration -> steps of synthetic packs or of its own data -> [profile] -> tools/profile_throughput.py.  Some
steps warm up, some are timed as they are, one runs under torch.profiler, and on a CPU one more counts live bytes.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_lance.checkpoint.hf_lance import RandomSource, WeightSource
from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import ModelConfig, RunConfig
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.sizes import has_positions
from megatron_lance.data.synthetic import scaled_packs
from megatron_lance.encoders.vae import SPATIAL, TEMPORAL, build_vae
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.objectives.losses import LossCounts
from megatron_lance.objectives.random_values import FilledPack
from megatron_lance.packing.packer import deal_packs
from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import VAE_KINDS, SegmentKind
from megatron_lance.parallel.dispatch import RankBatch
from megatron_lance.parallel.groups import Groups
from megatron_lance.profiling.devices import peak_tflops
from megatron_lance.profiling.encoder_flops import VitSizes, encoder_flops
from megatron_lance.profiling.flops import Work
from megatron_lance.profiling.live_bytes import LiveBytes
from megatron_lance.profiling.memory import PackLoad, memory_per_rank
from megatron_lance.profiling.step_time import amounts_of
from megatron_lance.profiling.step_traffic import step_transfers
from megatron_lance.profiling.throughput import Measured, summary
from megatron_lance.profiling.trace import marked, part, read_trace
from megatron_lance.training.setup import Trainee, build
from megatron_lance.training.step import forward_backward
from megatron_lance.training.synthetic import micro_batches
from megatron_lance.training.update import update

logger = logging.getLogger(__name__)

POOL = 2
"""Global batches of synthetic packs that steps take in turn."""


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        stage: whose mixture synthetic packs have; None: the run's own data.
        steps: timed steps.
        warmup: steps before them.
        encoders: run the encoders on random pixels before each synthetic step.
        traces: folder for a chrome trace of each rank; None: none is kept.
        pool: global batches of synthetic packs that steps take in turn.
    """

    stage: str | None
    steps: int
    warmup: int
    encoders: bool
    traces: Path | None
    pool: int = POOL


@dataclass(frozen=True)
class Inputs:
    """What a step trains on.

    Attributes:
        batches: this rank's micro-batches.
        counts: loss rows of the global batch.
        work: of the global batch.
        capacity: tokens its packs could hold.
        encoder_flops: of this replica's packs, this rank's share.
    """

    batches: Sequence[RankBatch]
    counts: LossCounts
    work: Work
    capacity: int
    encoder_flops: float


def _check_positions(packs: Sequence[Pack], model: ModelConfig, stage: str) -> None:
    """Raise UserError where a latent lies outside the position table."""
    frames, side = model.latent_position_frames, model.latent_position_size
    for pack in packs:
        for placed in pack.visual_segments(*VAE_KINDS):
            t, h, w = grid = placed.segment.grid or (1, 1, 1)
            if not has_positions(grid, frames, side):
                raise UserError(
                    f"--stage {stage}: a clip of {t} x {h} x {w} latents exceeds the position table of "
                    f"{frames} x {side} x {side}; set model.latent_position_frames=31 model.latent_position_size=64, "
                    "or leave --stage out to profile the run's own data"
                )


class MeaninglessWeights:
    """Weights drawn where the model computes: what a step costs does not depend on them, and the CPU takes a minute.

    Args:
        seed: of all of them; ranks that ask for the same tensors in turn get the same.
        device: that draws.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def get(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Ones for norms, else normal with standard deviation 0.02, float32 `shape`."""
        if "norm" in key:
            return torch.ones(shape, device=self.device)
        return torch.randn(shape, generator=self.generator, device=self.device) * 0.02


class SyntheticSource:
    """Steps of packs of a stage's mixture, random values, no data set.

    Args:
        run: the whole configuration; its capacity and global batch size shape the packs.
        groups: degrees and ranks.
        settings: stage, and whether encoders run.

    Raises:
        UserError: if the model's position table is too small for the stage's clips.
    """

    def __init__(self, run: RunConfig, groups: Groups, settings: Settings) -> None:
        self.run, self.groups = run, groups
        packs = run.training.global_batch_size
        sizes = {"hidden": run.model.hidden_size, "channels": run.model.latent_channels}
        planned = scaled_packs(str(settings.stage), settings.pool * packs, run.data.seq_length, run.training.seed)
        _check_positions(planned, run.model, str(settings.stage))
        filled = [
            FilledPack.random(p, **sizes, vocabulary=run.model.vocab_size, seed=run.training.seed) for p in planned
        ]
        self.vit = self.vae = None
        if settings.encoders:
            self.vit = VitEncoder.build(run.encoders, run.model.hidden_size, run.training.seed).to(groups.device)
            self.vae = build_vae(run.encoders, run.model.latent_channels, run.training.seed).to(groups.device)
        self.steps = [self._inputs(filled[i * packs : (i + 1) * packs]) for i in range(settings.pool)]

    def _inputs(self, filled: Sequence[FilledPack]) -> tuple[Inputs, list[Pack]]:
        packs = [f.pack for f in filled]
        works = [Work.of(pack) for pack in packs]
        mine = deal_packs([work.pairs for work in works], self.groups.dp)[self.groups.dp_rank]
        sizes = VitSizes() if self.vit is None else VitSizes.of(self.vit.vision.config)
        flops = sum(sum(encoder_flops(packs[i], sizes).values()) for i in mine) if self.vit is not None else 0.0
        inputs = Inputs(
            micro_batches(filled, self.run, self.groups),
            LossCounts.of(packs),
            Work.total(works),
            sum(pack.capacity for pack in packs),
            flops / self.groups.replica.size(),
        )
        return inputs, [packs[i] for i in mine]

    def step(self, number: int) -> Inputs:
        """The inputs of a step; encodes random pixels of the segments that fall to this rank."""
        inputs, packs = self.steps[number % len(self.steps)]
        if self.vit is not None:
            with part("encoders"):
                self._encode(packs)
        return inputs

    def _encode(self, packs: Sequence[Pack]) -> None:
        from megatron_lance.data.shares import share_out  # needs media libraries

        assert self.vit is not None and self.vae is not None
        segments = [
            (p.segment.kind, p.segment.grid or (1, 1, 1))
            for pack in packs
            for p in pack.visual_segments(SegmentKind.VIT, *VAE_KINDS)
        ]
        owners = share_out([t * h * w for _, (t, h, w) in segments], self.groups.replica.size())
        device, rank = self.groups.device, self.groups.replica.rank()
        for (kind, (t, h, w)), owner in zip(segments, owners, strict=True):
            if owner == rank and kind is SegmentKind.VIT:
                self.vit.encode([torch.rand(3, 2 * t, 28 * h, 28 * w, device=device)])
            elif owner == rank:
                self.vae.encode(torch.rand(3, TEMPORAL * (t - 1) + 1, SPATIAL * h, SPATIAL * w, device=device))

    def close(self) -> None:
        """Nothing is open."""


class DataSource:
    """Steps of a run's own data.

    Args:
        run: the whole configuration.
        groups: degrees and ranks.
        tokenizer: of the run.
    """

    def __init__(self, run: RunConfig, groups: Groups, tokenizer: Tokenizer) -> None:
        from megatron_lance.training.feed import Feed  # needs media libraries

        self.feed = Feed(run, groups, tokenizer)

    def step(self, number: int) -> Inputs:
        """The inputs of a step; what is not the encoders' is waiting for data."""
        with part("data wait"):
            inputs = self.feed.step(number)
        return Inputs(inputs.batches, inputs.counts, inputs.work, inputs.capacity, 0.0)

    def encoders(self) -> Iterator[torch.nn.Module]:
        """The modules whose forward passes encode."""
        for owner, name in ((self.feed.encoder.vit, "vision"), (self.feed.encoder.vae, "vae")):
            module = getattr(owner, name, None)
            if isinstance(module, torch.nn.Module):
                yield getattr(module, "encoder", module)

    def close(self) -> None:
        """End what reads ahead."""
        self.feed.close()


def _train(inputs: Inputs, run: RunConfig, trainee: Trainee, groups: Groups) -> None:
    own = forward_backward(trainee, inputs.batches, inputs.counts, run.objective, groups, broken=0)
    with part("optimizer"):
        update(trainee, own)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(
    source: SyntheticSource | DataSource, steps: range, run: RunConfig, trainee: Trainee, groups: Groups
) -> tuple[list[float], list[Work]]:
    """(seconds, work of the global batch) of steps as they are."""
    seconds, works = [], []
    for number in steps:
        start = time.perf_counter()
        inputs = source.step(number)
        _train(inputs, run, trainee, groups)
        _synchronize()
        seconds.append(time.perf_counter() - start)
        works.append(inputs.work)
    return seconds, works


def _profiled(
    source: SyntheticSource | DataSource, number: int, run: RunConfig, trainee: Trainee, groups: Groups, trace: Path
) -> tuple[dict[str, Any], Inputs]:
    """(a step's parts, its inputs); leaves the trace behind."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    encoders = source.encoders() if isinstance(source, DataSource) else ()
    with ExitStack() as stack:
        stack.enter_context(marked(trainee.stages, encoders))
        profiler = stack.enter_context(profile(activities=activities))
        with record_function("step"):
            inputs = source.step(number)
            _train(inputs, run, trainee, groups)
            _synchronize()
    profiler.export_chrome_trace(str(trace))
    found = read_trace(json.loads(trace.read_text(encoding="utf-8")), "step")
    return {"parts": found.parts, "profiled_seconds": found.seconds, "communication": found.communication}, inputs


def _memory(inputs: Inputs, run: RunConfig, trainee: Trainee, groups: Groups) -> dict[str, float]:
    """Bytes by kind on this rank, and what the formulas say.

    On a GPU "total" is the peak of all that is allocated, "reserved" that of what the allocator holds.
    """
    weights = [p for stage in trainee.stages for p in stage.parameters()]
    grads = [buffer.grad_data for chunk in trainee.chunks for buffer in chunk.buffers]
    state = [t for o in trainee.optimizer.chained_optimizers for s in o.optimizer.state.values() for t in s.values()]
    mains = [p for o in trainee.optimizer.chained_optimizers for g in o.optimizer.param_groups for p in g["params"]]
    held = [*state, *(mains if trainee.config.bf16 else [])]
    offloads = [stage.offload for stage in trainee.stages if stage.offload is not None]
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(trainee, inputs.batches, inputs.counts, run.objective, groups, broken=0)
        whole, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        peak = whole - before
    else:
        with LiveBytes(lambda: sum(offload.host_bytes for offload in offloads)) as counter:
            forward_backward(trainee, inputs.batches, inputs.counts, run.objective, groups, broken=0)
        peak, whole, reserved = counter.peak, 0, 0
    formula = memory_per_rank(run, dist.get_world_size(), PackLoad.of(inputs.batches))[groups.pp_rank]
    found: dict[str, float] = {
        "weights": sum(p.numel() * p.element_size() for p in weights),
        "gradients": sum(g.numel() * g.element_size() for g in grads),
        "optimizer": sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor)),
        "activations": peak,
    }
    return {
        **found,
        "activations by formula": formula.activation_bytes,
        "total": whole or sum(found.values()),
        "total by formula": formula.total_bytes,
        **({"reserved": reserved} if reserved else {}),
        **({"on the host by formula": formula.host_bytes} if offloads else {}),
    }


def _own(
    inputs: Inputs,
    run: RunConfig,
    groups: Groups,
    seconds: list[float],
    traced: dict[str, Any],
    memory: dict[str, float],
) -> dict[str, Any]:
    """What this rank reports."""
    works = [Work.computed(batch) for batch in inputs.batches]
    amounts = amounts_of(run, dist.get_world_size(), groups.pp_rank, Work.total(works), len(works))
    count = len(works)
    transfers = step_transfers(
        run,
        dist.get_world_size(),
        groups.pp_rank,
        und_rows=sum(work.und for work in works) / count,
        ce_rows=sum(work.ce for work in works) / count,
    )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {
        "rank": dist.get_rank(),
        "node": dist.get_rank() // local,
        "host": platform.node() if torch.cuda.is_available() else "",
        "pp_rank": groups.pp_rank,
        "seconds": seconds,
        **traced,
        "memory": memory,
        "amounts": asdict(amounts),
        "encoder_flops": inputs.encoder_flops,
        "transfers": [asdict(transfer) for transfer in transfers],
    }


def measure(
    run: RunConfig, groups: Groups, settings: Settings, folder: Path, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """Profile a run on the ranks of its groups; the same result on all of them.

    Args:
        run: the whole configuration, validated.
        groups: degrees and ranks.
        settings: what to measure.
        folder: for traces, existing.
        tokenizer: of the run; only its own data needs it.
    """
    size = run.model.vocab_size if tokenizer is None else tokenizer.size
    weights: WeightSource = RandomSource(run.training.seed, run.model)
    if tokenizer is None:
        weights = MeaninglessWeights(run.training.seed, groups.device)
    trainee = build(run, groups, size, weights)
    source = SyntheticSource(run, groups, settings) if tokenizer is None else DataSource(run, groups, tokenizer)
    trace = folder / f"rank{dist.get_rank():05d}.json"
    try:
        _timed(source, range(settings.warmup), run, trainee, groups)
        steps = range(settings.warmup, settings.warmup + settings.steps)
        seconds, works = _timed(source, steps, run, trainee, groups)
        logger.info("seconds of the timed steps: %s", " ".join(f"{one:.4f}" for one in seconds))
        traced, inputs = _profiled(source, steps.stop, run, trainee, groups, trace)
        memory = _memory(inputs, run, trainee, groups)
        own = _own(inputs, run, groups, seconds, traced, memory)
    finally:
        source.close()
    everyone: list[Any] = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if settings.traces is None:
        trace.unlink()
    rows = [sum(batch.region_rows) for batch in inputs.batches]
    measured = Measured(
        ranks=everyone,
        works=works,
        profiled=inputs.work,
        capacity=inputs.capacity,
        padded=sum(rows) * groups.cp * groups.dp,
        peak_tflops=run.profiling.peak_tflops or peak_tflops(run.training.precision),
        device="cuda" if torch.cuda.is_available() else "cpu",
        source=settings.stage or run.data.pack_index,
    )
    return summary(run, measured)
