"""Which layout trains a model fastest on a cluster.

Station: model, packs, cluster, rates -> [layouts ranked by predicted throughput] -> tools/plan_parallelism.py.

Every combination of tp x cp x pp x vpp x dp and recompute that divides model, batch and devices is looked at; what does
not fit is discarded with the reason.  Those left are ranked by tokens per second and device, for layouts may differ in
packs per step within a tolerance of the recipe's.  Offload of activations and recompute of one expert alone are not
among what is tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_lance.config.loader import ConfigError
from megatron_lance.config.schema import Fp8Config, ParallelConfig, RunConfig
from megatron_lance.config.validate import validate
from megatron_lance.profiling.cluster import FP8_GAIN, FRAGMENTATION, RESERVED_GIB, Cluster
from megatron_lance.profiling.flops import bagel_flops, model_flops
from megatron_lance.profiling.memory import GIB, RankMemory, memory_per_rank
from megatron_lance.profiling.plan_inputs import PlanPacks
from megatron_lance.profiling.step_time import Rates, StepTime, load_of, predict

RECOMPUTE: tuple[tuple[str | None, tuple[str, ...]], ...] = (
    (None, ("core_attn",)),
    ("selective", ("layernorm",)),
    ("selective", ("core_attn",)),
    ("selective", ("core_attn", "layernorm")),
    ("selective", ("mlp",)),
    ("selective", ("layernorm", "mlp")),
    ("selective", ("core_attn", "layernorm", "mlp")),
    ("full", ("core_attn",)),
)
"""What may be recomputed, from least to most."""
FP8_RECIPE = "tensorwise"  # the one that needs no history and no Blackwell
TP, CP, VPP = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64), (None, 2, 3)


@dataclass(frozen=True)
class Choice:
    """A layout that fits.

    Attributes:
        run: the configuration with it.
        devices: it takes.
        micro_batches: packs of a replica in a step.
        memory: of the fullest rank.
        memory_gib: of it, with what the device holds beside.
        time: predicted.
        tokens_per_second: real tokens, per device.
        mfu: predicted, from real tokens and mask pairs.
        bagel_mfu: by the BAGEL formula.
    """

    run: RunConfig
    devices: int
    micro_batches: int
    memory: RankMemory
    memory_gib: float
    time: StepTime
    tokens_per_second: float
    mfu: float
    bagel_mfu: float

    @property
    def degrees(self) -> dict[str, int]:
        """tp, cp, pp, vpp, dp."""
        p = self.run.parallel
        tp, cp, pp = (
            p.tensor_model_parallel_size,
            p.context_parallel_size,
            p.pipeline_model_parallel_size,
        )
        vpp = p.virtual_pipeline_model_parallel_size or 1
        return {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "dp": self.devices // (tp * cp * pp)}

    @property
    def fp8(self) -> bool:
        """Whether linears run in FP8."""
        return self.run.fp8.recipe != "none"

    @property
    def recompute(self) -> str:
        """What is recomputed, as text."""
        p = self.run.parallel
        if p.recompute_granularity == "selective":
            return "+".join(p.recompute_modules)
        return p.recompute_granularity or "none"

    @property
    def name(self) -> str:
        """Short."""
        degrees = "-".join(f"{name}{size}" for name, size in self.degrees.items() if size > 1) or "one"
        return f"{degrees}, {self.recompute}{', fp8' if self.fp8 else ''}"

    def overrides(self) -> list[str]:
        """Settings of a run with this layout."""
        p = self.run.parallel
        vpp, granularity = p.virtual_pipeline_model_parallel_size, p.recompute_granularity
        found = {
            "tensor_model_parallel_size": p.tensor_model_parallel_size,
            "context_parallel_size": p.context_parallel_size,
            "pipeline_model_parallel_size": p.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": "null" if vpp is None else vpp,
            "recompute_granularity": granularity or "null",
        }
        if granularity == "selective":
            found["recompute_modules"] = f"[{','.join(p.recompute_modules)}]"
        lines = [f"parallel.{name}={value}" for name, value in found.items()]
        if self.fp8:
            lines += [f"model.transformer_impl={self.run.model.transformer_impl}", f"fp8.recipe={self.run.fp8.recipe}"]
        return [*lines, f"training.global_batch_size={self.run.training.global_batch_size}"]

    def record(self) -> dict[str, Any]:
        """As JSON."""
        kinds = ("weight_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes")
        return {
            **self.degrees,
            "micro_batches": self.micro_batches,
            "global_batch_size": self.run.training.global_batch_size,
            "recompute": self.recompute,
            "fp8": self.fp8,
            "memory_gib": {
                **{kind.removesuffix("_bytes"): getattr(self.memory, kind) / GIB for kind in kinds},
                "with_reserve": self.memory_gib,
            },
            "step_seconds": self.time.seconds,
            "seconds_by_part": self.time.parts,
            "tokens_per_second_per_device": self.tokens_per_second,
            "mfu": self.mfu,
            "bagel_mfu": self.bagel_mfu,
            "overrides": self.overrides(),
        }


@dataclass(frozen=True)
class Discarded:
    """A layout that is not possible.

    Attributes:
        name: of the layout.
        kind: of reason.
        reason: in full.
        missing_gib: that a device would need more; 0 where memory is not the reason.
    """

    name: str
    kind: str
    reason: str
    missing_gib: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
        choices: that fit, the fastest first.
        discarded: that do not.
    """

    choices: tuple[Choice, ...]
    discarded: tuple[Discarded, ...]

    def best_by_degrees(self) -> list[Choice]:
        """The fastest of each combination of degrees, in bf16 and in FP8, the fastest first."""
        found: dict[tuple[int, ...], Choice] = {}
        for choice in self.choices:
            found.setdefault((*choice.degrees.values(), choice.fp8), choice)
        return list(found.values())

    def reasons(self) -> dict[str, tuple[int, str]]:
        """By kind how many were discarded, and one of them: of those that do not fit the one that nearly does."""
        count = Counter(found.kind for found in self.discarded)
        example: dict[str, Discarded] = {}
        for found in sorted(self.discarded, key=lambda found: found.missing_gib):
            example.setdefault(found.kind, found)
        return {kind: (n, f"{example[kind].name}: {example[kind].reason}") for kind, n in count.most_common()}


@dataclass(frozen=True)
class Wanted:
    """What to plan for.

    Attributes:
        run: model, precision and optimizer; its layout is ignored.
        packs: of the data.
        packs_per_step: the recipe's.
        tolerance: by which packs per step may differ from it, as a share.
        recompute: what may be recomputed.
        virtual: numbers of virtual stages that are tried.
        fp8: also look at FP8 linears.
    """

    run: RunConfig
    packs: PlanPacks
    packs_per_step: int
    tolerance: float = 0.2
    recompute: Sequence[tuple[str | None, tuple[str, ...]]] = RECOMPUTE
    virtual: Sequence[int | None] = VPP
    fp8: bool = False


def _degrees(wanted: Wanted, cluster: Cluster) -> Iterator[tuple[int, int, int, int | None]]:
    """Combinations of (tp, cp, pp, vpp) that divide the devices."""
    layers = wanted.run.model.num_layers
    for tp in TP:
        for cp in CP:
            for pp in (n for n in range(1, min(layers, 16) + 1) if layers % n == 0):
                if tp > cluster.links.node_size or cluster.devices % (tp * cp * pp):
                    continue
                for vpp in wanted.virtual if pp > 1 else (None,):
                    yield tp, cp, pp, vpp


def _packs_of(dp: int, wanted: Wanted) -> int | None:
    """Micro-batches per replica closest to the recipe's packs per step, None if none is close enough."""
    count = max(1, round(wanted.packs_per_step / dp))
    return count if abs(dp * count / wanted.packs_per_step - 1) <= wanted.tolerance else None


def _layout(wanted: Wanted, degrees: tuple[int, int, int, int | None], packs: int) -> RunConfig:
    tp, cp, pp, vpp = degrees
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        region_alignment=wanted.run.parallel.region_alignment,
    )
    run = wanted.run
    return replace(
        run,
        parallel=parallel,
        fp8=Fp8Config(),
        data=replace(run.data, seq_length=wanted.packs.capacity, sources=(), balance_replicas=None),
        training=replace(run.training, global_batch_size=packs),
    )


def plan(wanted: Wanted, cluster: Cluster, rates: Rates) -> Plan:
    """Look at every layout.

    Args:
        wanted: model, packs, batch.
        cluster: devices.
        rates: of a device.

    Raises:
        ConfigError: if the configuration is impossible on any layout.
    """
    validate(_layout(wanted, (1, 1, 1, None), wanted.packs_per_step), 1)
    choices: list[Choice] = []
    discarded: list[Discarded] = []
    for degrees in _degrees(wanted, cluster):
        tp, cp, pp, vpp = degrees
        name = f"tp{tp}-cp{cp}-pp{pp}" + (f"-vpp{vpp}" if vpp else "")
        dp = cluster.devices // (tp * cp * pp)
        micro_batches = _packs_of(dp, wanted)
        if micro_batches is None:
            reason = f"dp {dp} cannot deal about {wanted.packs_per_step} packs evenly; raise cp, tp or pp"
            discarded.append(Discarded(name, "packs per step", reason))
            continue
        run = _layout(wanted, degrees, dp * micro_batches)
        try:
            validate(run, cluster.devices)
        except ConfigError as error:
            discarded.append(Discarded(name, "does not divide", str(error).splitlines()[0]))
            continue
        for granularity, modules in wanted.recompute:
            parallel = replace(run.parallel, recompute_granularity=granularity, recompute_modules=modules)
            found = _choice(replace(run, parallel=parallel), wanted, cluster, rates, micro_batches)
            (choices if isinstance(found, Choice) else discarded).append(found)  # type: ignore[arg-type]
    for choice in [*choices] if wanted.fp8 else []:
        found = _in_fp8(choice, wanted, cluster, rates)
        (choices if isinstance(found, Choice) else discarded).append(found)  # type: ignore[arg-type]
    return Plan(tuple(sorted(choices, key=lambda choice: -choice.tokens_per_second)), tuple(discarded))


def held_gib(memory: RankMemory) -> float:
    """GiB of a device that a rank needs, with what is held beside."""
    fixed = memory.total_bytes - memory.activation_bytes
    return (fixed + FRAGMENTATION * memory.activation_bytes) / GIB + RESERVED_GIB


def _choice(run: RunConfig, wanted: Wanted, cluster: Cluster, rates: Rates, micro_batches: int) -> Choice | Discarded:
    """A layout with its time, or why it does not fit."""
    memories = memory_per_rank(run, cluster.devices, load_of(wanted.packs.packs, run))
    fullest = max(memories, key=held_gib)
    needed = held_gib(fullest)
    if needed > cluster.memory_gib:
        empty = StepTime(1.0, {})
        name = Choice(run, cluster.devices, micro_batches, fullest, needed, empty, 0.0, 0.0, 0.0).name
        reason = f"a rank needs {needed:.0f} GiB, a device has {cluster.memory_gib:.0f}"
        return Discarded(name, "does not fit in memory", reason, needed - cluster.memory_gib)
    return timed(run, wanted, cluster, rates, micro_batches)


def _in_fp8(choice: Choice, wanted: Wanted, cluster: Cluster, rates: Rates) -> Choice | Discarded:
    """A layout with FP8 linears, or what FP8 asks for and it lacks."""
    model = replace(choice.run.model, transformer_impl="transformer_engine")
    run = replace(choice.run, model=model, fp8=Fp8Config(recipe=FP8_RECIPE))
    try:
        validate(run, cluster.devices)
    except ConfigError as error:
        return Discarded(f"{choice.name}, fp8", "not in FP8", str(error).splitlines()[0])
    return timed(run, wanted, cluster, rates, choice.micro_batches)


def timed(run: RunConfig, wanted: Wanted, cluster: Cluster, rates: Rates, micro_batches: int) -> Choice:
    """A layout with its memory and predicted time.

    Args:
        run: the configuration with it.
        wanted: what is planned for.
        cluster: devices.
        rates: of a device.
        micro_batches: packs of a replica in a step.
    """
    memory = max(memory_per_rank(run, cluster.devices, load_of(wanted.packs.packs, run)), key=held_gib)
    if run.fp8.recipe != "none":
        rates = replace(rates, linears=FP8_GAIN * rates.linears)
    packs = run.training.global_batch_size
    deal = wanted.packs.deal(packs // micro_batches, micro_batches)
    time = predict(run, cluster.devices, rates, wanted.packs.packs, deal)
    work, per_device = wanted.packs.mean_work, packs / time.seconds / cluster.devices
    used = [per_device * flops(run.model, work) / 1e12 / cluster.device.tflops for flops in (model_flops, bagel_flops)]
    return Choice(
        run,
        cluster.devices,
        micro_batches,
        memory,
        held_gib(memory),
        time,
        per_device * work.tokens,
        used[0],
        used[1],
    )


def explain(plan_: Plan, runners_up: int = 4) -> list[str]:
    """Why the winner wins: what each runner-up spends more and less of, per pack and device."""
    best = plan_.best_by_degrees()
    if not best:
        return [
            "no layout fits; the reasons: " + "; ".join(f"{k}: {n}, e.g. {e}" for k, (n, e) in plan_.reasons().items())
        ]
    winner = best[0]

    def per_pack(choice: Choice) -> dict[str, float]:
        scale = choice.devices / choice.run.training.global_batch_size
        return {part: seconds * scale for part, seconds in choice.time.parts.items()}

    base = per_pack(winner)
    largest = sorted(base.items(), key=lambda item: -item[1])[:4]
    lines = [
        f"{winner.name}: {winner.tokens_per_second:.0f} tokens/s and device, MFU {winner.mfu:.1%}, "
        f"{winner.memory_gib:.0f} GiB; device seconds per pack: "
        + ", ".join(f"{part} {seconds:.2f}" for part, seconds in largest)
    ]
    for choice in best[1 : 1 + runners_up]:
        own = per_pack(choice)
        more = sorted(((own.get(p, 0.0) - base.get(p, 0.0), p) for p in {*own, *base}), key=lambda item: -abs(item[0]))
        told = ", ".join(f"{part} {difference:+.2f} s" for difference, part in more[:3] if abs(difference) >= 0.005)
        slower = winner.tokens_per_second / choice.tokens_per_second - 1
        lines.append(f"{choice.name}: {slower:.1%} slower; {told}; {choice.memory_gib:.0f} GiB")
    if any(choice.fp8 for choice in best):
        lines.append(f"FP8: linears {FP8_GAIN} times as fast, which is assumed; memory is that of bf16")
    return lines
