"""Benchmark of QK-norm + MaPE rotation: the fused op against plain torch, compiled torch and TransformerEngine.

Station: one layer's QKV of one expert -> forward, backward, both -> [times, bytes, GB/s] -> tools/bench.py.  Bytes are
those that must move: what has to be read read once, what has to be written written once.  The bandwidth of a plain copy
is measured in the same run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from tqdm import tqdm

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import ModelConfig
from megatron_lance.ops.attention_trial import FAILURES
from megatron_lance.ops.mape import inverse_frequencies
from megatron_lance.ops.qk_norm_mape import qk_norm_mape, why_not_fused
from megatron_lance.profiling.benchmarks.timing import here, percentiles, run_times

SUMMARY = "QK-norm + MaPE rotation, fused op against plain torch, torch.compile and TransformerEngine"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODEL = ModelConfig()  # 16 query heads, 2 key/value heads of 128 channels
CONTENDERS = ("fused", "eager", "compile", "transformer_engine")
PHASES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Contender:
    """A way to compute q and kv.

    Attributes:
        call: computes them.
        leaves: what gradients are taken of.
        once: its backward frees what forward kept, so that it can be timed only together with a forward.
    """

    call: Callable[[], tuple[torch.Tensor, ...]]
    leaves: tuple[torch.Tensor, ...]
    once: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 16384, 45056, 81920], help="rows of the region")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4], help="tensor-parallel sizes")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of QKV (default bfloat16)")
    parser.add_argument("--only", choices=CONTENDERS, nargs="+", default=list(CONTENDERS), help="what to measure")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each (default 20)")


@dataclass(frozen=True)
class Shape:
    """What one tensor-parallel rank has."""

    groups: int  # key/value heads
    group_heads: int  # query heads of a group in QKV
    taken: int  # of them, this rank's

    @classmethod
    def of(cls, tp: int) -> Shape:
        """Heads of a rank; beyond the key/value heads, ranks share a group."""
        group_heads = MODEL.num_attention_heads // MODEL.num_query_groups
        sharing = max(1, tp // MODEL.num_query_groups)
        return cls(max(1, MODEL.num_query_groups // tp), group_heads, group_heads // sharing)

    def bytes_moved(self, rows: int, itemsize: int) -> dict[str, int]:
        """Bytes that must move, by phase; weights and their gradients are too small to count."""
        taken, whole = self.groups * (self.taken + 2), self.groups * (self.group_heads + 2)
        head, positions = rows * MODEL.kv_channels * itemsize, rows * 3 * 4
        forward = 2 * taken * head + positions
        backward = (taken + self.groups * (self.taken + 1) + whole) * head + positions  # v itself is not read
        return {"forward": forward, "backward": backward, "both": forward + backward}


@dataclass(frozen=True)
class Inputs:
    """One call's tensors, and gradients of what it gives."""

    qkv: torch.Tensor
    positions: torch.Tensor
    inv_freq: torch.Tensor
    query_weight: torch.Tensor
    key_weight: torch.Tensor
    d_query: torch.Tensor
    d_key_value: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The op's tensors."""
        return self.qkv, self.positions, self.inv_freq, self.query_weight, self.key_weight

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What gradients are taken of."""
        return self.qkv, self.query_weight, self.key_weight

    @classmethod
    def random(cls, shape: Shape, rows: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Normal values, positions to 200,000."""
        generator, d = torch.Generator(device).manual_seed(0), MODEL.kv_channels

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=dtype)

        positions = torch.randint(0, 200_001, (3, rows), generator=generator, device=device, dtype=torch.int32)
        return cls(
            normal(rows, shape.groups, (shape.group_heads + 2) * d).requires_grad_(),
            positions,
            inverse_frequencies(d, MODEL.rotary_base, "float32").to(device),
            normal(d).requires_grad_(),
            normal(d).requires_grad_(),
            normal(rows, shape.groups * shape.taken, d),
            normal(rows, 2, shape.groups, d),
        )


def _op(x: Inputs, shape: Shape, backend: str) -> tuple[torch.Tensor, ...]:
    return qk_norm_mape(
        *x.inputs,
        sections=MODEL.mrope_section,
        eps=MODEL.layernorm_epsilon,
        backend=backend,
        query_heads=shape.taken,
    )


def _transformer_engine(x: Inputs, shape: Shape) -> Contender:
    """TransformerEngine's RMSNorm and fused rotation of q and of k; angles are prepared beforehand."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    d, device = MODEL.kv_channels, x.qkv.device
    norms = [te.RMSNorm(d, eps=MODEL.layernorm_epsilon, dtype=x.qkv.dtype, device=device) for _ in range(2)]
    for norm, weight in zip(norms, (x.query_weight, x.key_weight), strict=True):
        norm.weight = torch.nn.Parameter(weight.detach().clone())
    by_axis = zip(x.positions.float(), x.inv_freq.split(list(MODEL.mrope_section)), strict=True)
    angles = torch.cat([torch.outer(position, frequencies) for position, frequencies in by_axis], dim=1)
    angles = torch.cat([angles, angles], dim=1)[:, None, None]  # [r, 1, 1, d]

    def call() -> tuple[torch.Tensor, ...]:
        heads = x.qkv.view(*x.qkv.shape[:2], -1, d)
        query = norms[0](heads[:, :, : shape.taken].flatten(1, 2))
        key = norms[1](heads[:, :, -2])
        query, key = (apply_rotary_pos_emb(y.unsqueeze(1), angles, fused=True).squeeze(1) for y in (query, key))
        return query, torch.stack([key, heads[:, :, -1]], dim=1)

    return Contender(call, (x.qkv, *(norm.weight for norm in norms)), once=True)


def _contenders(x: Inputs, shape: Shape, wanted: list[str], absent: dict[str, str]) -> Iterator[tuple[str, Contender]]:
    """What can be measured here; the reason for what cannot goes to `absent`."""
    for name in wanted:
        if name == "fused" and (reason := why_not_fused(MODEL.kv_channels, x.qkv.device)):
            absent[name] = reason
        elif name == "transformer_engine" and (find_spec(name) is None or x.qkv.device.type != "cuda"):
            absent[name] = "not installed" if find_spec(name) is None else "needs a GPU"
        elif name == "transformer_engine":
            yield name, _transformer_engine(x, shape)
        elif name == "compile":
            yield name, Contender(partial(torch.compile(_op, fullgraph=True), x, shape, "reference"), x.leaves)
        else:
            yield name, Contender(partial(_op, x, shape, "reference" if name == "eager" else "fused"), x.leaves)


def _figures(times: list[float], moved: int) -> dict[str, float]:
    found = percentiles(times)
    return {**found, "gb_per_s": moved / found["p50_ms"] / 1e6}


def _measure(contender: Contender, x: Inputs, moved: dict[str, int], repeats: int) -> dict[str, dict[str, float]]:
    """Times of the three phases of one contender."""
    given = (x.d_query, x.d_key_value)

    def forward() -> None:
        with torch.no_grad():
            contender.call()

    outputs = () if contender.once else contender.call()

    def backward() -> None:
        torch.autograd.grad(outputs, contender.leaves, given, retain_graph=True)

    def both() -> None:
        torch.autograd.grad(contender.call(), contender.leaves, given)

    bodies = {"forward": forward, **({} if contender.once else {"backward": backward}), "both": both}
    return {
        phase: _figures(run_times(body, repeats, x.qkv.device), moved[phase]) for phase, body in bodies.items()
    }  # fmt: skip


def _copy_bandwidth(moved: int, repeats: int, device: torch.device) -> float:
    """GB/s, read and written, of a copy that moves as many bytes."""
    source = torch.ones(moved // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return _figures(run_times(lambda: target.copy_(source), repeats, device), 2 * source.numel())["gb_per_s"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the result is one JSON object.

    Raises:
        UserError: for sizes that cannot be.
    """
    if min(args.rows) < 1 or args.repeats < 1 or not set(args.tp) <= {1, 2, 4, 8, 16}:
        raise UserError(
            f"--rows {args.rows} --tp {args.tp} --repeats {args.repeats}: positive, and tp divides 16 heads"
        )
    device = here()
    dtype, measured = DTYPES[args.dtype], []
    absent: dict[str, str] = {}
    for tp, rows in tqdm([(tp, rows) for tp in args.tp for rows in args.rows], desc="sizes", leave=False):
        torch.compiler.reset()
        shape = Shape.of(tp)
        x, moved = Inputs.random(shape, rows, dtype, device), shape.bytes_moved(rows, dtype.itemsize)
        case: dict[str, Any] = {"tp": tp, "rows": rows, "bytes": moved, "times": {}, "failed": {}}
        case["copy_gb_per_s"] = _copy_bandwidth(moved["forward"], args.repeats, device)
        for name, contender in _contenders(x, shape, args.only, absent):
            try:
                case["times"][name] = _measure(contender, x, moved, args.repeats)
            except FAILURES as error:
                case["failed"][name] = f"{type(error).__name__}: {error}"
        measured.append(case)
    return {
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "absent": absent,
        "cases": measured,
    }


def table(result: dict[str, Any]) -> str:
    """A line per size and phase: p50 in ms and, for the fused op, GB/s and its share of the copy bandwidth."""
    lines = [
        f"{result['dtype']}, {result['threads']} threads, load average {result['load_average']:.1f}",
        f"{'tp':>3} {'rows':>6} {'phase':<9} {'copy GB/s':>9} "
        + " ".join(f"{name + ' ms':>22}" for name in CONTENDERS),
    ]
    lines += [f"{name}: not measured, {reason}" for name, reason in result["absent"].items()]
    for case in result["cases"]:
        lines += [f"{case['tp']:>3} {case['rows']:>6} {name}: {why}" for name, why in case["failed"].items()]
        for phase in PHASES:
            cells = []
            for name in CONTENDERS:
                figures = case["times"].get(name, {}).get(phase)
                share = figures["gb_per_s"] / case["copy_gb_per_s"] if figures else 0
                cells.append(f"{figures['p50_ms']:>9.2f} ({share:>4.0%} of copy)" if figures else f"{'-':>22}")
            lines.append(
                f"{case['tp']:>3} {case['rows']:>6} {phase:<9} {case['copy_gb_per_s']:>9.1f} " + " ".join(cells)
            )
    return "\n".join(lines)
