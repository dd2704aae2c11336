"""Which attention backend serves a run: what was asked for, or the fastest of a short trial on the device.

Station: building the model -> [choice, once per process] -> joint attention of all layers.  On a GPU, `auto` times
forward and backward of every backend that can serve, on a plan like a small training pack, holds their results against
plain torch, and takes the fastest.  One rank measures and all take its choice, so ranks never differ.

Shapes: hq query heads, hkv key/value heads, d channels per head of one tensor-parallel rank.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
import torch.distributed as dist

from megatron_lance.ops.attention import BACKENDS, joint_attention
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind

logger = logging.getLogger(__name__)

CANDIDATES = ("varlen_te", "varlen_torch", "flex", "sdpa")
TRUTH = "sdpa"
TRIAL_SIDE = 30  # rows and columns of the trial's latents: 28,000 tokens together
REPEATS, WARMUP = 5, 2
TOLERANCE = 0.02  # of the norm of the output; bf16 kernels differ by 0.003
FAILURES = (RuntimeError, ImportError, OSError, AssertionError, TypeError, ValueError)
"""Of compilers, libraries and kernels on trial; compiled functions of another version may take other arguments."""


class AttentionUnavailable(ValueError):  # noqa: N818  the state of the installation, said to the user
    """The backend that was asked for cannot serve; the message says why."""


@dataclass(frozen=True)
class Heads:
    """Heads of one tensor-parallel rank: hq, hkv and d."""

    query: int
    key_value: int
    channels: int


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes:
        milliseconds: of forward and backward, median, by backend.
        discarded: backend -> why it was not timed or not trusted.
    """

    milliseconds: dict[str, float]
    discarded: dict[str, str]

    @property
    def fastest(self) -> str:
        """The backend that took the least time."""
        return min(self.milliseconds, key=lambda name: self.milliseconds[name])

    def describe(self) -> str:
        """All timings and reasons on one line."""
        timed = [f"{name} {self.milliseconds[name]:.2f} ms" for name in sorted(self.milliseconds, key=self._time)]
        return "; ".join([*timed, *(f"{name} not: {reason}" for name, reason in self.discarded.items())])

    def _time(self, name: str) -> float:
        return self.milliseconds[name]


def trial_plan(side: int) -> AttentionPlan:
    """An edit of a clip and two generations in one pack, about 31 side**2 tokens.

    Args:
        side: rows and columns of its latents.
    """

    def visual(kind: SegmentKind, frames: int) -> Segment:
        return Segment.visual(kind, (frames, side, side))

    text, end = Segment.text(side * side // 6 + 8), Segment.text(1)
    edit = (text, visual(SegmentKind.VIT, 4), visual(SegmentKind.CLEAN, 9), text, visual(SegmentKind.NOISE, 9), end)
    samples = (
        Sample("edit", Task.V_EDIT, edit),
        Sample("clip", Task.T2V, (text, visual(SegmentKind.NOISE, 7), end)),
        Sample("picture", Task.T2I, (text, visual(SegmentKind.NOISE, 1), end)),
    )
    return AttentionPlan.from_pack(Pack(samples, sum(sample.length for sample in samples)))


def milliseconds(body: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Wall time of each run, with everything done on the device."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats):
        settle()
        start = time.perf_counter()
        body()
        settle()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def run_trial(
    candidates: Sequence[str], heads: Heads, dtype: torch.dtype, device: torch.device, plan: AttentionPlan
) -> Trial:
    """Time forward and backward of backends on random values and compare their results with plain torch's.

    Args:
        candidates: keys of BACKENDS.
        heads: of this rank.
        dtype: of q.
        device: to run on.
        plan: of all queries of a pack.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(count: int, kind: torch.dtype) -> torch.Tensor:
        return torch.randn(plan.length, count, heads.channels, generator=generator, device=device, dtype=kind)

    grad, *leaves = (
        normal(heads.query, dtype),
        normal(heads.query, dtype),
        *(normal(heads.key_value, torch.float32) for _ in range(2)),
    )
    for leaf in leaves:
        leaf.requires_grad_()

    def results(name: str) -> list[torch.Tensor]:
        out = joint_attention(*leaves, plan, name)  # type: ignore[call-arg, arg-type]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    truth = results(TRUTH)
    times: dict[str, float] = {}
    discarded: dict[str, str] = {}
    for name in candidates:
        if reason := BACKENDS[name].why_not(device, dtype, heads.channels):
            discarded[name] = reason
            continue
        try:
            errors = [_relative(a, b) for a, b in zip(results(name), truth, strict=True)]
            if not max(errors) <= TOLERANCE:  # also if it is no number
                discarded[name] = "wrong by " + ", ".join(f"{error:.2g}" for error in errors) + " (out, dq, dk, dv)"
                continue
            milliseconds(lambda name=name: results(name), WARMUP, device)  # type: ignore[misc]
            times[name] = median(milliseconds(lambda name=name: results(name), REPEATS, device))  # type: ignore[misc]
        except FAILURES as error:
            discarded[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Trial(times, discarded)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@cache
def choose_attention(requested: str, heads: Heads, dtype: torch.dtype, device: torch.device) -> str:
    """The backend of a run; said once in the log.  With `auto` on GPUs all ranks must call it.

    Args:
        requested: `auto` or a key of BACKENDS.
        heads: of this rank, the same on all ranks.
        dtype: of q.
        device: of the activations.

    Returns:
        a key of BACKENDS; on a CPU `auto` is plain torch, without a trial.

    Raises:
        AttentionUnavailable: if a backend was asked for, or chosen by the first rank, that cannot serve here.
        ValueError: for another name.
    """
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"model.attention_backend {requested!r}: choose one of {['auto', *BACKENDS]}")
    chosen, because = requested, ""
    if requested == "auto" and device.type != "cuda":
        chosen, because = TRUTH, ": no GPU, no trial"
    elif requested == "auto":
        chosen, because = _agreed(heads, dtype, device)
    if reason := BACKENDS[chosen].why_not(device, dtype, heads.channels):
        raise AttentionUnavailable(f"{chosen} {reason}")
    logger.info("joint attention: %s (model.attention_backend = %s)%s", chosen, requested, because)
    return chosen


def _agreed(heads: Heads, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """(the first rank's choice, its timings), the same on all ranks."""
    together = dist.is_available() and dist.is_initialized()
    said: list[tuple[str, str]] = [("", "")]
    if not together or dist.get_rank() == 0:
        trial = run_trial(CANDIDATES, heads, dtype, device, trial_plan(TRIAL_SIDE))
        said = [(trial.fastest, ": " + trial.describe())]
        torch.cuda.empty_cache()
    if together:
        dist.broadcast_object_list(said, src=0, device=device)
    return said[0]
