"""Whether measured steps and kernels are as fast and as large as they ought to be.

Station: results of the suites for GPUs -> [criteria] -> their reports (tools/gpu_check.py).  Every value is held
against what the same run measured: a step against its roofline, FP8 against bf16, the attention that the model calls
against the bare kernels, the peak of memory against the memory model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_lance.profiling.roofline import LINEARS

ROOFLINE_SHARE = 0.85
FP8_LINEARS = 1.5
AMDAHL_SHARE = 0.9
ATTENTION_SHARE = 0.9
MEMORY_OFF = 0.1
_WORK = {"forward": 4, "backward": 10}  # FLOP per pair, query head and channel


@dataclass(frozen=True)
class Criterion:
    """One value and its bound.

    Attributes:
        value: as measured; NaN: it could not be.
        bound: that it must reach, or stay below.
        at_least: which of the two.
    """

    value: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether it does; not if it is no number."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def record(self) -> dict[str, Any]:
        """For a report, which has null where there is no value."""
        return {**asdict(self), "value": None if math.isnan(self.value) else self.value, "met": self.met}


def linears_seconds(profile: Mapping[str, Any]) -> float:
    """Seconds of both experts' linears in a profiled step, forward and backward, quantising included."""
    return float(sum(profile["parts"][name]["mean"] for name in LINEARS))


def fp8_criteria(half: Mapping[str, Any], quarter: Mapping[str, Any]) -> dict[str, Criterion]:
    """How much faster linears and steps are in FP8 than in bf16.

    The Amdahl bound is the step in bf16 with its linears as fast as they are in FP8.

    Args:
        half: profile of steps in bf16.
        quarter: of the same steps in FP8.
    """
    before, after = linears_seconds(half), linears_seconds(quarter)
    faster = limit = math.nan
    if before and after:  # else the profiler told no part's kernels
        faster, bound = before / after, half["step_seconds"]["p50"] - before + after
        limit = bound / quarter["step_seconds"]["p50"]
    return {
        "linears in FP8 over bf16": Criterion(faster, FP8_LINEARS),
        "Amdahl bound over step in FP8": Criterion(limit, AMDAHL_SHARE),
    }


def memory_criterion(profile: Mapping[str, Any]) -> Criterion:
    """How far the peak of all that is allocated is from the memory model, as a share of the model's."""
    peak, predicted = (profile["memory"][kind]["max"] for kind in ("total", "total by formula"))
    return Criterion(abs(peak - predicted) / predicted, MEMORY_OFF, at_least=False)


def _together(found: Mapping[str, Any], prefix: str) -> float:
    """TFLOP/s of forward and backward one after another."""
    return sum(_WORK.values()) / sum(work / found[prefix + phase]["tflops"] for phase, work in _WORK.items())


def _raw(found: Mapping[str, Any]) -> float:
    """Of the kernels of a backend alone, or of its calls where it has no others."""
    return _together(found, "kernel ") if "kernel forward" in found else float(found["both"]["tflops"])


def attention_criteria(cases: Iterable[Mapping[str, Any]]) -> dict[str, Criterion]:
    """What the fastest backend reaches as the model calls it, as a share of the fastest kernel's rate.

    Args:
        cases: of `tools/bench.py attention`; those of Lance packs count.
    """
    found = {}
    for case in cases:
        backends = case["backends"]
        if case["case"] == "lance" and backends:
            reached = max(backends, key=lambda name: backends[name]["both"]["tflops"])
            raw = max(map(_raw, backends.values()))
            name = f"attention of {case['length']} tokens, {reached} over the fastest kernel"
            found[name] = Criterion(backends[reached]["both"]["tflops"] / raw, ATTENTION_SHARE)
    return found
