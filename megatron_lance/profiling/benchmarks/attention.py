"""Benchmark of the joint attention's backends beside what the device does at most.

Station: plans (one full or causal sequence; a packed Lance plan) -> forward, backward, both -> [times, TFLOP/s] ->
tools/bench.py.  Counted are allowed pairs alone: 4 FLOP per pair, query head and channel forward, 10 backward.  Of
variable-length backends the kernels are timed alone too, on keys gathered beforehand: the raw rate.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import ModelConfig
from megatron_lance.data.synthetic import STAGES, scaled_packs
from megatron_lance.ops.attention import BACKENDS, KERNELS, joint_attention
from megatron_lance.ops.attention_trial import CANDIDATES, FAILURES
from megatron_lance.ops.attention_varlen import varlen_calls
from megatron_lance.packing.attention_plan import AttentionPlan, AttentionSlice
from megatron_lance.profiling.benchmarks.ceilings import measure_ceilings
from megatron_lance.profiling.benchmarks.timing import here, percentiles, run_times

SUMMARY = "TFLOP/s of every attention backend, forward and backward, with copy and GEMM ceilings"
MODEL = ModelConfig()  # 16 query heads, 2 key/value heads of 128 channels
CASES = ("full", "causal", "lance")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COMPILED = ("flex",)
"""Backends that are compiled for each length, forward and backward."""
PHASES = ("forward", "backward", "both", "kernel forward", "kernel backward")
_FLOPS = dict(zip(PHASES, (4, 10, 14, 4, 10), strict=True))  # per pair, query head and channel
_GPU_SIZES, _CPU_SIZES = (8192, 1 << 30), (32, 1 << 24)  # rows of products, bytes copied


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768, 65536], help="tokens of a pack")
    parser.add_argument(
        "--cases", choices=CASES, nargs="+", default=["full", "lance"], help="masks (default full lance)"
    )
    parser.add_argument("--stage", choices=sorted(STAGES), default="ct3", help="of the Lance packs (default ct3)")
    parser.add_argument("--seed", type=int, default=0, help="of the Lance packs (default 0)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of queries (default bfloat16)")
    parser.add_argument(
        "--only", choices=list(BACKENDS), nargs="+", default=list(CANDIDATES), help="backends (default those of auto)"
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each (default 10)")


def plan_of(case: str, length: int, stage: str, seed: int = 0) -> AttentionPlan:
    """The plan of a case; a Lance pack is filled as well as the stage's samples allow."""
    if case == "lance":
        return AttentionPlan.from_pack(scaled_packs(stage, 1, length, seed)[0])
    return AttentionPlan(length, (AttentionSlice((0, length), ((0, length),), case == "causal"),))


class _Inputs:
    """q in the benchmark's type, k and v in float32, as the model hands them over, and a gradient."""

    def __init__(self, plan: AttentionPlan, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, kind: torch.dtype) -> torch.Tensor:
            size = (plan.length, heads, MODEL.kv_channels)
            return torch.randn(*size, generator=generator, device=device, dtype=kind)

        self.plan, self.device = plan, device
        self.q = normal(MODEL.num_attention_heads, dtype).requires_grad_()
        self.k, self.v = (normal(MODEL.num_query_groups, torch.float32).requires_grad_() for _ in range(2))
        self.grad = normal(MODEL.num_attention_heads, dtype)

    def both(self, name: str) -> None:
        """Forward and backward of a backend."""
        leaves = (self.q, self.k, self.v)
        torch.autograd.grad(joint_attention(*leaves, self.plan, name), leaves, self.grad)

    def bodies(self, name: str) -> dict[str, Callable[[], object]]:
        """What is timed of a backend, by phase."""
        leaves = (self.q, self.k, self.v)

        def call() -> torch.Tensor:
            return joint_attention(*leaves, self.plan, name)

        def forward() -> None:
            with torch.no_grad():
                call()

        out = call()
        return {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(out, leaves, self.grad, retain_graph=True),
            "both": lambda: self.both(name),
            **(self._kernel_bodies(name) if name in KERNELS else {}),
        }

    def _kernel_bodies(self, name: str) -> dict[str, Callable[[], object]]:
        """The kernel alone, both calls of the plan."""
        kernel, given = KERNELS[name], []
        for call in varlen_calls(self.plan, self.device):
            q, grad = (x.detach().index_select(0, call.query_rows) for x in (self.q, self.grad))
            k, v = (x.detach().to(q.dtype).index_select(0, call.key_tokens) for x in (self.k, self.v))
            given.append((call, grad, (q, k, v), *kernel.forward(q, k, v, call, True)))
        return {
            "kernel forward": lambda: [kernel.forward(*x, call, True) for call, _, x, _, _ in given],
            "kernel backward": lambda: [kernel.backward(g, *x, out, state, c) for c, g, x, out, state in given],
        }


def _measure(name: str, inputs: _Inputs, repeats: int) -> dict[str, Any]:
    """Times and rates of one backend on one plan, and on a GPU the peak of its memory."""
    per_pair = inputs.plan.mask_pairs * MODEL.num_attention_heads * MODEL.kv_channels
    found: dict[str, Any] = {}
    for phase, body in inputs.bodies(name).items():
        times = percentiles(run_times(body, repeats, inputs.device))
        found[phase] = {**times, "tflops": 1e-9 * _FLOPS[phase] * per_pair / times["p50_ms"]}
    if inputs.device.type == "cuda":
        before = torch.cuda.memory_allocated(inputs.device)
        torch.cuda.reset_peak_memory_stats(inputs.device)
        inputs.both(name)
        found["peak_mib"] = (torch.cuda.max_memory_allocated(inputs.device) - before) / 2**20
    return found


def _measure_all(
    cases: list[dict[str, Any]],
    plans: Sequence[AttentionPlan],
    names: Sequence[str],
    args: argparse.Namespace,
    device: torch.device,
) -> None:
    """Fill the cases in, the long ones first, of one length in order; what is compiled for each comes last."""
    pairs = sorted(zip(cases, plans, strict=True), key=lambda pair: -pair[0]["length"])
    for name, (case, plan) in tqdm([(name, pair) for name in names for pair in pairs], leave=False):
        try:
            case["backends"][name] = _measure(name, _Inputs(plan, DTYPES[args.dtype], device), args.repeats)
        except FAILURES as error:  # after an illegal access nothing works any more, and each says so
            case["failed"][name] = f"{type(error).__name__}: {error}"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the result is one JSON object, also of a run that is interrupted ("stopped").

    Raises:
        UserError: for sizes that cannot be.
    """
    if min(args.lengths) < 1 or args.repeats < 1:
        raise UserError(f"--lengths {args.lengths} --repeats {args.repeats}: must be positive; correct them")
    device, dtype = here(), DTYPES[args.dtype]
    absent = {name: BACKENDS[name].why_not(device, dtype, MODEL.kv_channels) for name in args.only}
    absent = {name: reason for name, reason in absent.items() if reason}
    rows, copied = _GPU_SIZES if device.type == "cuda" else _CPU_SIZES
    ceilings = measure_ceilings(rows, copied, args.repeats, device)
    names = sorted((name for name in args.only if name not in absent), key=COMPILED.__contains__)
    kinds = [(kind, length) for length in args.lengths for kind in args.cases]
    plans = [plan_of(kind, length, args.stage, args.seed) for kind, length in kinds]
    cases = [
        {
            **{"case": kind, "length": length, "tokens": plan.length, "pairs": plan.mask_pairs},
            **{"slices": len(plan.slices), "backends": {}, "failed": {}},
        }
        for (kind, length), plan in zip(kinds, plans, strict=True)
    ]
    stopped = False
    try:
        _measure_all(cases, plans, names, args, device)
    except KeyboardInterrupt:  # what is measured by then is worth having
        stopped = True
    return {
        "heads": [MODEL.num_attention_heads, MODEL.num_query_groups, MODEL.kv_channels],
        "dtype": args.dtype,
        "stage": args.stage,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "ceilings": ceilings,
        "absent": absent,
        "stopped": stopped,
        "cases": cases,
    }


def table(result: dict[str, Any]) -> str:
    """A line per case and backend: TFLOP/s and milliseconds of each phase."""
    ceilings, heads = result["ceilings"], "{}:{} heads of {}".format(*result["heads"])
    lines = [f"{heads}, {result['dtype']}; copy {ceilings['copy_gb_per_s']:.0f} GB/s"]
    for name, rates in ceilings["tflops"].items():
        lines.append(f"{name} products of {ceilings['rows']} rows, TFLOP/s: " + _rates(rates))
    lines += [f"{name}: not measured, {reason}" for name, reason in {**ceilings["absent"], **result["absent"]}.items()]
    lines.append(f"{'case':<7} {'tokens':>6} {'backend':<15} " + " ".join(f"{phase:>21}" for phase in PHASES))
    for case in result["cases"]:
        for name, found in case["backends"].items():
            cells = [
                f"{found[phase]['tflops']:>8.1f} {found[phase]['p50_ms']:>9.2f} ms" if phase in found else f"{'-':>21}"
                for phase in PHASES
            ]
            lines.append(f"{case['case']:<7} {case['tokens']:>6} {name:<15} " + " ".join(cells))
        lines += [f"{case['case']:<7} {case['tokens']:>6} {name}: {why}" for name, why in case["failed"].items()]
    return "\n".join(lines)


def _rates(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
