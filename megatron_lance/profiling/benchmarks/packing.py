"""Benchmark of packing: how full packs are, how evenly replicas work, how alike the steps of a mixture are.

Station: synthetic samples of a stage -> packs of steps -> [figures] -> tools/bench.py.  Costs are FLOPs of a layer, in
mask pairs.  Beside the step packer stands the greedy one: every rank packs its own random
stream as it comes, with a buffer of 50 samples that did not fit.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_lance.config.schema import ModelConfig
from megatron_lance.data.step_shape import token_cost
from megatron_lance.data.synthetic import STAGES, stage_samples
from megatron_lance.packing.packer import deal_packs, mask_pairs
from megatron_lance.packing.rng import stream
from megatron_lance.packing.step_balance import IntArray, Samples
from megatron_lance.packing.step_packer import StepShape, pack_steps

SUMMARY = "fill, cost per replica and mixture per step of the packs of a stage, beside a greedy packer"
BUFFER = 50
FloatArray = npt.NDArray[np.float64]
Step = Sequence[Sequence[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--stage", choices=sorted(STAGES), default="ct3", help="mixture and budget (default ct3)")
    parser.add_argument("--dp", type=int, default=24, help="replicas (default 24)")
    parser.add_argument("--micro-batches", type=int, default=2, help="packs per replica and step (default 2)")
    parser.add_argument("--samples", type=int, default=25000, help="samples (default 25000)")
    parser.add_argument("--balance-dp", type=int, help="data.balance_replicas (default: half the global batch)")
    parser.add_argument("--bands", type=int, nargs="+", default=[1], help="data.length_bands, several for a curve")
    parser.add_argument("--window", type=int, default=384, help="data.planning_window (default 384)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")


def _greedy(samples: Samples, ranks: int, micro_batches: int, capacity: int, least: int, seed: int) -> Iterator[Step]:
    """Steps of `ranks` packers, each with its own samples in random order and a buffer of 50.

    A pack begins with the oldest sample of the buffer and goes on with the stream.  A sample that does not fit goes to
    the buffer; once that is full it closes the pack and begins the next.  A pack of `least` tokens is closed too.
    """
    order = stream(seed, "random order").permutation(len(samples.length)).tolist()
    packed: list[list[list[int]]] = []
    for rank in range(ranks):
        buffer: deque[int] = deque()
        packs: list[list[int]] = [[]]
        tokens = 0
        for sample in order[rank::ranks]:
            if not packs[-1] and buffer:
                packs[-1].append(buffer.popleft())
                tokens = int(samples.length[packs[-1][0]])
            fits = tokens + samples.length[sample] <= capacity
            if not fits and len(buffer) < BUFFER:
                buffer.append(sample)
                continue
            if not fits:
                packs.append([])
                tokens = 0
            packs[-1].append(sample)
            tokens += int(samples.length[sample])
            if tokens >= least:
                packs.append([])
                tokens = 0
        packed.append(packs[:-1])  # the last one is cut off by the end of the stream
    for step in range(min(map(len, packed)) // micro_batches):
        yield [pack for packs in packed for pack in packs[step * micro_batches : (step + 1) * micro_batches]]


def _random(samples: Samples, tokens: int, seed: int) -> Iterator[Step]:
    """Steps of as many tokens in random order, each as one pack."""
    order = stream(seed, "random order").permutation(len(samples.length))
    step = np.cumsum(samples.length[order]) // tokens
    for number in range(int(step[-1])):
        yield [order[step == number].tolist()]


def _shares(samples: Samples, steps: Sequence[Step]) -> FloatArray:
    """Share of a step's tokens that each group has: [steps, groups]."""
    groups = int(samples.group.max()) + 1
    rows = []
    for step in steps:
        inside = [i for pack in step for i in pack]
        tokens = np.bincount(samples.group[inside], samples.length[inside], groups)
        rows.append(tokens / tokens.sum())
    return np.array(rows)


def _figures(samples: Samples, steps: Sequence[Step], replicas: int, capacity: int, dealt: bool) -> dict[str, Any]:
    """Fill, max over mean of the replicas' cost, spread of the steps' cost."""
    costs = [[int(samples.cost[list(pack)].sum()) for pack in step] for step in steps]
    ratios = []
    for step in costs:
        parts = deal_packs(step, replicas) if dealt else np.array_split(np.arange(len(step)), replicas)
        loads = [sum(step[i] for i in part) for part in parts]
        ratios.append(max(loads) / float(np.mean(loads)))
    lengths = np.array([samples.length[list(pack)].sum() for step in steps for pack in step])
    of_steps = np.array([sum(step) for step in costs])
    return {
        "steps": len(steps),
        "fill": float(lengths.mean() / capacity),
        "fewest_tokens": int(lengths.min()),
        "max_over_mean": {"mean": float(np.mean(ratios)), "worst": float(np.max(ratios))},
        "deviation_of_step_cost": float(of_steps.std() / of_steps.mean()),
    }


def _simulate(args: argparse.Namespace) -> tuple[Samples, IntArray, list[str]]:
    """Samples with their costs, their mask pairs, and the names of the groups."""
    tasks = list(STAGES[args.stage].shares())
    drawn = islice(stage_samples(args.stage, args.seed), args.samples)
    rows = [
        (s.length, mask_pairs(s.segments), tasks.index(s.task))
        for s in tqdm(drawn, desc="samples", total=args.samples, leave=False)
    ]
    length, pairs, group = np.array(rows, np.int64).T
    cost = pairs + np.round(token_cost(ModelConfig()) * length).astype(np.int64)
    return Samples(length, cost, group), pairs, [str(task) for task in tasks]


def _planned(samples: Samples, pairs: IntArray, shape: StepShape, seed: int) -> tuple[list[Step], dict[str, Any]]:
    """The whole steps of the step packer, and what is known of all its packs."""
    start = time.process_time()
    rows = zip(samples.length.tolist(), pairs.tolist(), samples.group.tolist(), strict=True)
    steps: list[Step] = list(pack_steps(rows, shape, seed))
    seconds = time.process_time() - start
    packs = sum(map(len, steps))
    whole = [step for step in steps[:-1] if len(step) == shape.packs]
    rest = {"packs": packs, "fill_of_all": float(samples.length.sum() / (packs * shape.capacity))}
    return whole, rest | {"cpu_seconds_per_million_samples": 1e6 * seconds / len(samples.length)}


def _mixture_error(samples: Samples, steps: Sequence[Step], stage: str) -> float:
    """Largest difference of a task's share of the samples of 1,000 packs (or all) in a row from the recipe's."""
    wanted = np.array(list(STAGES[stage].shares().values()))
    packs = [pack for step in steps for pack in step]
    counts = np.array([np.bincount(samples.group[list(pack)], minlength=len(wanted)) for pack in packs])
    ahead = np.concatenate([np.zeros((1, len(wanted)), np.int64), np.cumsum(counts, 0)])
    several = min(1000, len(packs))
    runs = ahead[several:] - ahead[:-several]
    return float(np.abs(runs / runs.sum(1, keepdims=True) - wanted).max())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the result is one JSON object."""
    samples, pairs, tasks = _simulate(args)
    capacity, packs = STAGES[args.stage].capacity, args.dp * args.micro_batches
    random = _shares(samples, list(_random(samples, packs * capacity, args.seed)))
    balanced = args.balance_dp or (packs if packs % 2 else packs // 2)
    curve = []
    for bands in args.bands:
        shape = StepShape(capacity, packs, balanced, token_cost(ModelConfig()), args.window, bands)
        steps, known = _planned(samples, pairs, shape, args.seed)
        shares = _shares(samples, steps)
        ratios = dict(zip(tasks, (shares.std(0) / random.std(0)).tolist(), strict=True))
        curve.append(
            {"bands": bands, "balanced_for": balanced, **_figures(samples, steps, args.dp, capacity, dealt=True)}
            | known
            | {"share_deviation_over_random": ratios, "worst_share_deviation": max(ratios.values())}
            | {"mixture_error_over_1000_packs": _mixture_error(samples, steps, args.stage)}
        )
    least = STAGES[args.stage].min_tokens
    greedy = list(_greedy(samples, args.dp, args.micro_batches, capacity, least, args.seed))
    return {
        "stage": args.stage,
        "dp": args.dp,
        "micro_batches": args.micro_batches,
        "samples": args.samples,
        "capacity": capacity,
        "min_tokens": least,
        "longest_sample": int(samples.length.max()),
        "window": args.window,
        "share_deviation_of_random_order": dict(zip(tasks, random.std(0).tolist(), strict=True)),
        "planned": curve,
        "greedy": _figures(samples, greedy, args.dp, capacity, dealt=False),
    }


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [
        f"{result['samples']} samples of stage {result['stage']}, longest {result['longest_sample']} tokens, packs of "
        f"{result['capacity']}, dp {result['dp']} x {result['micro_batches']} micro-batches",
        f"{'packer':>8} {'bands':>5} {'fill':>7} {'fewest':>7} {'max/mean cost (worst)':>22} {'step cost dev':>13} "
        f"{'share dev / random':>18} {'CPU s/1M':>8}",
    ]
    for figures in [*result["planned"], result["greedy"]]:
        ratio = figures["max_over_mean"]
        known = "bands" in figures
        lines.append(
            f"{'steps' if known else 'greedy':>8} {figures.get('bands', '-'):>5} {figures['fill']:>7.2%} "
            f"{figures['fewest_tokens']:>7} {ratio['mean']:>12.3f} ({ratio['worst']:.3f}) "
            f"{figures['deviation_of_step_cost']:>14.1%} "
            + (
                f"{figures['worst_share_deviation']:>18.2f} {figures['cpu_seconds_per_million_samples']:>8.0f}"
                if known
                else ""
            )
        )
    return "\n".join(lines)
