"""How long a step takes by formula: amounts of work of a rank over rates.

Station: configuration, packs and rates -> [seconds by part] -> planner.  Rates are calibrated from profiles
(tools/profile_throughput.py) or taken from published figures.

A pack takes a stage of its pipeline

    linears / rate + attention / rate + heads / rate + elementwise bytes / bandwidth + tp, cp and pp transfers

with rows as a layout pads them, recompute included; on a GPU the host launches ahead, and the longer of both counts.  A
replica with M packs takes the sum of its packs on the slowest stage, and its longest pack once more for each other
stage, over the virtual stages (the bubble).  The step is the slowest replica's, with encoders before, and gradients,
optimizer and weights after it; gradients and weights that travel beside backward and forward passes cost what is left
of them.  Copies of offloaded activations between device and host (parallel.offload_layers) are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.schema import ParallelConfig, RunConfig
from megatron_lance.ops.attention_varlen import kernel_calls
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.layout import rows_per_rank
from megatron_lance.packing.sample import Pack
from megatron_lance.profiling.encoder_flops import encoder_flops
from megatron_lance.profiling.flops import Work, flops_by_part
from megatron_lance.profiling.memory import PackLoad, layer_activation_bytes, layers_of_stages, memory_per_rank
from megatron_lance.profiling.step_traffic import Links, Transfer, step_transfers

TOUCHED = 5
"""How often the kept activations of a layer pass memory, forward and backward, in what is no matrix product."""
OPTIMIZER_BYTES = 40
"""Bytes that AdamW moves per parameter: gradient, main weight and two moments, read and written, and for norms."""


@dataclass(frozen=True)
class Amounts:
    """What one rank does.

    Attributes:
        linears: FLOPs of both experts' linears, with recompute.
        attention: FLOPs, with recompute.
        heads: FLOPs of the LM head, the velocity head and the embedder.
        elementwise: bytes that norms, rotation, activations and residuals move.
        passes: of a layer, forward, backward and again.
        optimizer: bytes.
    """

    linears: float = 0.0
    attention: float = 0.0
    heads: float = 0.0
    elementwise: float = 0.0
    passes: float = 0.0
    optimizer: float = 0.0


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        linears: FLOP/s.
        attention: FLOP/s of allowed pairs.
        heads: FLOP/s.
        elementwise: bytes/s.
        optimizer: bytes/s.
        encoders: FLOP/s of the frozen encoders.
        pass_seconds: host time of a pass of a layer.
        host_ahead: whether the host launches work ahead of a device.
        exposed_keys: share of key and value gathers that nothing hides.
        links: between devices.
        source: where the figures are from.
    """

    linears: float
    attention: float
    heads: float
    elementwise: float
    optimizer: float
    encoders: float
    pass_seconds: float
    host_ahead: bool
    exposed_keys: float
    links: Links
    source: str

    def seconds(self, amounts: Amounts) -> dict[str, float]:
        """Of some work, by part."""
        by_part = {
            "linears": amounts.linears / self.linears,
            "attention": amounts.attention / self.attention,
            "heads": amounts.heads / self.heads,
            "elementwise": amounts.elementwise / self.elementwise,
        }
        host = amounts.passes * self.pass_seconds
        by_part["host"] = max(host - sum(by_part.values()), 0.0) if self.host_ahead else host
        by_part["optimizer"] = amounts.optimizer / self.optimizer
        return by_part


def _again(parallel: ParallelConfig) -> float:
    """Passes of a layer that recompute adds to forward and backward."""
    if parallel.recompute_granularity == "full":
        return 1.0
    return len(parallel.recompute_modules) / 3 if parallel.recompute_granularity == "selective" else 0.0


def amounts_of(run: RunConfig, world_size: int, pp_rank: int, work: Work, micro_batches: int) -> Amounts:
    """What one rank of a stage does in a step.

    Args:
        run: the whole configuration.
        world_size: processes of the run.
        pp_rank: stage.
        work: of its micro-batches, as its context-parallel rank computes them.
        micro_batches: how many.
    """
    model, parallel = run.model, run.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = layers_of_stages(run)[pp_rank]
    share = layers / model.num_layers / tp
    parts = flops_by_part(model, work, parallel, run.training.freeze)
    ends = sum(parts[name].computed for name, rank in (("embedder", 0), ("heads", pp - 1)) if rank == pp_rank)
    kept = layer_activation_bytes(replace(run, parallel=replace(parallel, recompute_granularity=None)))
    touched = (TOUCHED + 2 * _again(parallel)) * kept * layers * micro_batches
    memory = memory_per_rank(run, world_size)[pp_rank]
    shards = world_size // (tp * pp) if parallel.use_distributed_optimizer else 1
    return Amounts(
        linears=share * (parts["linears und"].computed + parts["linears gen"].computed),
        attention=share * parts["attention"].computed,
        heads=ends / tp,
        elementwise=touched,
        passes=layers * micro_batches * (2 + _again(parallel)),
        optimizer=OPTIMIZER_BYTES * memory.trained / shards,
    )


@dataclass(frozen=True)
class PackShape:
    """What of a pack costs time.

    Attributes:
        work: real tokens and mask pairs.
        encoder_flops: of its pictures and clips.
        copied_keys: that attention copies for its calls, in tokens, on one context-parallel rank; on the busiest of
            several it is a little less.
    """

    work: Work
    encoder_flops: float
    copied_keys: int

    @classmethod
    def of(cls, pack: Pack) -> PackShape:
        """What a pack costs."""
        calls = kernel_calls(AttentionPlan.from_pack(pack))
        keys = sum(stop - start for _, ranges, _ in calls for start, stop in ranges)
        return cls(Work.of(pack), sum(encoder_flops(pack).values()), keys)


@dataclass(frozen=True)
class StepTime:
    """A predicted step.

    Attributes:
        seconds: of the step, mean over the steps looked at.
        parts: seconds of the slowest stage by part, the bubble and waiting for slower replicas included.
    """

    seconds: float
    parts: dict[str, float]


Deal = Sequence[Sequence[Sequence[int]]]
"""By step and replica the numbers of its packs."""


def _transfer_seconds(run: RunConfig, transfers: Sequence[Transfer], rates: Rates) -> dict[str, float]:
    """By axis, of a step; what gathers of keys and values hide behind projections is left out."""
    by_axis = {axis: 0.0 for axis in ("tp", "cp", "pp")}
    for transfer in transfers:
        if transfer.axis in by_axis:
            by_axis[transfer.axis] += rates.links.seconds(transfer)
    by_axis["cp"] *= rates.exposed_keys
    return by_axis


def predict(run: RunConfig, world_size: int, rates: Rates, packs: Sequence[PackShape], deal: Deal) -> StepTime:
    """The time of a step.

    Args:
        run: the whole configuration.
        world_size: processes of the run.
        rates: of a device.
        packs: of some steps.
        deal: which replica has which of them.
    """
    parallel = run.parallel
    tp, cp, pp = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    chunks, micro_batches = parallel.virtual_pipeline_model_parallel_size or 1, len(deal[0][0])
    pairs = np.array([pack.work.pairs for pack in packs], float)
    ce = np.array([pack.work.ce for pack in packs], float)
    stages = [_stage_costs(run, world_size, rank, rates, packs, micro_batches) for rank in range(pp)]
    per_pack = np.array([base + a * pairs + h * ce for base, a, h, _ in stages])  # [stages, packs]
    totals, bubbles = [], []
    for step in deal:
        sums = np.array([per_pack[:, list(replica)].sum(1) for replica in step])  # [replicas, stages]
        longest = np.array([per_pack[:, list(replica)].max(1) for replica in step])
        busiest = sums.argmax(1)
        bubble = (longest.sum(1) - longest[np.arange(len(step)), busiest]) / chunks
        times = sums.max(1) + bubble
        slowest = int(times.argmax())
        totals.append((float(times[slowest]), float(times.mean())))
        bubbles.append(float(bubble[slowest]))
    slow, mean = np.array(totals).mean(0)
    worst = int(np.argmax([base for base, *_ in stages]))
    parts = {name: seconds * micro_batches for name, seconds in stages[worst][3].items()}
    mean_pack = stages[worst]
    parts["attention"] = float(mean_pack[1] * pairs.mean() * micro_batches)
    parts["heads"] = float(mean_pack[2] * ce.mean() * micro_batches)
    parts["bubble"] = float(np.mean(bubbles))
    parts["waiting for replicas"] = float(slow - mean)
    encoded = [max(sum(packs[i].encoder_flops for i in replica) for replica in step) for step in deal]
    parts["encoders"] = float(np.mean(encoded)) / (tp * cp * pp) / rates.encoders
    parts |= _after(run, world_size, worst, rates, float(slow) / micro_batches)
    extra = parts["encoders"] + parts["gradients and weights"] + parts["optimizer"]
    return StepTime(float(slow) + extra, parts)


def _stage_costs(
    run: RunConfig, world_size: int, pp_rank: int, rates: Rates, packs: Sequence[PackShape], micro_batches: int
) -> tuple[float, float, float, dict[str, float]]:
    """(seconds of any pack, per mask pair, per CE row; the first by part) on a stage."""
    parallel, cp = run.parallel, run.parallel.context_parallel_size
    rows = rows_per_rank(run.data.seq_length, cp, parallel.tensor_model_parallel_size, row_alignment(run))
    und = float(np.mean([pack.work.und / max(pack.work.tokens, 1) for pack in packs]))
    ce = float(np.mean([pack.work.ce for pack in packs])) / cp
    timesteps = max((pack.work.timesteps for pack in packs), default=1)
    base = Work(round(und * rows), rows - round(und * rows), 0, 0, timesteps)
    each = amounts_of(run, world_size, pp_rank, base, 1)
    by_part = rates.seconds(replace(each, optimizer=0.0))
    by_part.pop("optimizer")
    million = amounts_of(run, world_size, pp_rank, Work(pairs=10**6), 0).attention / 1e6 / cp / rates.attention
    row = (amounts_of(run, world_size, pp_rank, Work(ce=1), 0).heads) / cp / rates.heads
    transfers = step_transfers(run, world_size, pp_rank, und_rows=und * rows, ce_rows=ce)
    for axis, seconds in _transfer_seconds(run, transfers, rates).items():
        by_part[f"{axis} communication"] = seconds / micro_batches
    return sum(by_part.values()), million, row, by_part


def _after(run: RunConfig, world_size: int, pp_rank: int, rates: Rates, pack_seconds: float) -> dict[str, float]:
    """Gradients, weights and optimizer; what is overlapped hides behind the forward third of a pack, or the rest."""
    transfers = step_transfers(run, world_size, pp_rank, und_rows=0.0, ce_rows=0.0)
    exposed = 0.0
    for transfer in (t for t in transfers if t.axis == "dp"):
        backward = transfer.name == "gradients"
        hidden = run.parallel.overlap_grad_reduce if backward else run.parallel.overlap_param_gather
        behind = pack_seconds * (2 / 3 if backward else 1 / 3) if hidden else 0.0
        exposed += max(rates.links.seconds(transfer) - behind, 0.0)
    amounts = amounts_of(run, world_size, pp_rank, Work(), 0)
    return {"gradients and weights": exposed, "optimizer": amounts.optimizer / rates.optimizer}


_SPENT = {
    "linears": ("linears und", "linears gen"),
    "attention": ("attention",),
    "heads": ("heads", "embedder"),
    "elementwise": ("norms and activations", "mape", "other"),
    "optimizer": ("optimizer",),
    "passes": ("host and waiting",),
}
"""Amounts, and the parts of a profile that their seconds are in."""


def _sent(transfers: Iterable[Mapping[str, Any]], node_size: int) -> list[float]:
    """[bytes within a node, latencies within one, bytes between nodes, latencies between them] of a rank's step."""
    found = [0.0] * 4
    for transfer in (Transfer(**each) for each in transfers):
        if transfer.ranks > 1:
            outside = transfer.outside(node_size)
            first = 2 if outside else 0
            found[first] += outside or transfer.moved
            found[first + 1] += transfer.steps
    return found


def _fitted_links(profiles: Sequence[Mapping[str, Any]], base: Links) -> Links:
    """Bandwidths and latencies by non-negative least squares of what ranks sent against its exposed seconds.

    Links that no profile used keep those of the base: one node says nothing of what lies between nodes.
    """
    from scipy.optimize import nnls

    rows = []
    for profile in profiles:
        node_size = max(Counter(rank["node"] for rank in profile["ranks"]).values())
        for rank in profile["ranks"]:
            exposed = rank["parts"]["exposed communication"] / profile["profiler_slows"]
            rows.append([*_sent(rank["transfers"], node_size), exposed])
    sent, exposed = np.array(rows)[:, :4], np.array(rows)[:, 4]
    scale = np.maximum(sent.max(0), 1.0)
    found = np.maximum(nnls(sent / scale, exposed)[0] / scale, 1e-15)
    within, between = sent[:, 1].any(), sent[:, 3].any()
    return Links(
        base.node_size,
        float(1 / found[0]) if within else base.node_bandwidth,
        float(1 / found[2]) if between else base.network_bandwidth,
        float(found[1]) if within else base.node_latency,
        float(found[3]) if between else base.network_latency,
    )


def calibrate(profiles: Sequence[Mapping[str, Any]], base: Rates) -> Rates:
    """Rates from profiles of tools/profile_throughput.py.

    Each rate is what all ranks of all profiles did over the seconds it took, without what the profiler itself took;
    bandwidth and latency of links are the non-negative least-squares fit of the exposed communication.

    Args:
        profiles: their JSON objects; of one kind of machine.
        base: supplies what no profile holds, such as the rate of encoders that did not run.
    """
    ranks = [rank for profile in profiles for rank in profile["ranks"]]
    done = {name: sum(rank["amounts"][name] for rank in ranks) for name in _SPENT}
    taken: Counter[str] = Counter()
    for profile in profiles:
        for rank in profile["ranks"]:
            taken.update({name: seconds / profile["profiler_slows"] for name, seconds in rank["parts"].items()})
    spent = {name: sum(taken[part] for part in parts) for name, parts in _SPENT.items()}
    encoded, encoding = sum(rank["encoder_flops"] for rank in ranks), taken["encoders"]

    def rate(name: str, otherwise: float) -> float:
        return done[name] / spent[name] if done[name] and spent[name] else otherwise

    return Rates(
        linears=rate("linears", base.linears),
        attention=rate("attention", base.attention),
        heads=rate("heads", base.heads),
        elementwise=rate("elementwise", base.elementwise),
        optimizer=rate("optimizer", base.optimizer),
        encoders=encoded / encoding if encoded and encoding else base.encoders,
        pass_seconds=spent["passes"] / done["passes"] if done["passes"] else base.pass_seconds,
        host_ahead=all(profile["device"] == "cuda" for profile in profiles),
        exposed_keys=1.0,
        links=_fitted_links(profiles, base.links),
        source=f"{len(profiles)} profiles",
    )


def load_of(packs: Sequence[PackShape], run: RunConfig) -> PackLoad:
    """What memory has to hold for the heaviest of some packs."""
    cp = run.parallel.context_parallel_size
    und, gen = (max(getattr(p.work, expert) / max(p.work.tokens, 1) for p in packs) for expert in ("und", "gen"))
    return PackLoad(max(1, -(-max(p.work.ce for p in packs) // cp)), max(p.copied_keys for p in packs), und, gen)
