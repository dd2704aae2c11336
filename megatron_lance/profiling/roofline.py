"""How near a measured step is to what its matrix products and its attention allow by themselves.

Station: a profile and the attention benchmark of the same machine -> [roofline] -> tools/gpu_check.py.  The roofline is
the time of the model's linears at the rate of products of their sizes plus that of the attention at the rate of the
fastest backend; norms, activations, optimizer and the host are what it leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lance.profiling.benchmarks.ceilings import BF16, FP8_BLOCKS, FP8_EXACT, FP8_FAST, FP8_ROWS, layer_shapes

LINEARS = ("linears und", "linears gen")
OTHER_PRODUCTS = ("embedder", "heads")
ATTENTION_WORK = 3.5  # forward and backward over forward, as the benchmark counts


@dataclass(frozen=True)
class Roofline:
    """Of one step.

    Attributes:
        linears_seconds: of both experts' linears.
        other_seconds: of the heads and the embedder, in bf16.
        attention_seconds: forward and backward.
        step_seconds: as measured, median.
    """

    linears_seconds: float
    other_seconds: float
    attention_seconds: float
    step_seconds: float

    @property
    def seconds(self) -> float:
        """The roofline."""
        return self.linears_seconds + self.other_seconds + self.attention_seconds

    @property
    def share(self) -> float:
        """Of the roofline's speed that the step reaches."""
        return self.seconds / self.step_seconds


def linears_tflops(rates: Mapping[str, float]) -> float:
    """Rate of a layer's four products one after another, from the rate of each."""
    flops = {name: inputs * outputs for name, (_, inputs, outputs) in layer_shapes(1).items() if name != "square"}
    return sum(flops.values()) / sum(work / rates[name] for name, work in flops.items())


def products_of(recipe: str) -> tuple[str, str, str]:
    """Kinds of products that linears compute outputs, gradients of inputs and gradients of weights by.

    They are those of TransformerEngine 2.11 on Hopper; the benchmark times all in the sizes of the outputs' products.

    Args:
        recipe: of FP8, or none.
    """
    if recipe == "none":
        return BF16, BF16, BF16
    return (FP8_BLOCKS, FP8_BLOCKS, FP8_ROWS) if recipe == "blockwise" else (FP8_FAST, FP8_EXACT, FP8_EXACT)


def roofline(profile: Mapping[str, Any], measured: Mapping[str, Any], length: int, recipe: str) -> Roofline:
    """The roofline of a profile of one device whose timed steps had one pack.

    Args:
        profile: of tools/profile_throughput.py, one rank.
        measured: of `tools/bench.py attention`, on the same machine and pack.
        length: the budget of tokens, which names the benchmark's case of a Lance pack.
        recipe: of FP8, in which the linears computed, or none.

    Raises:
        ValueError: if the benchmark lacks the case or the rates.
    """
    cases = [case for case in measured["cases"] if (case["case"], case["length"]) == ("lance", length)]
    products = measured["ceilings"]["tflops"]
    kinds = products_of(recipe)
    if not cases or not cases[0]["backends"] or not products.keys() >= {*kinds}:
        raise ValueError(f"the benchmark has no Lance pack of {length} tokens or no products of {', '.join(kinds)}")
    attention = max(found["both"]["tflops"] for found in cases[0]["backends"].values())
    flops = profile["flops"]
    first = sum(flops[name]["forward"] + flops[name]["recompute"] for name in LINEARS)
    half = sum(flops[name]["backward"] for name in LINEARS) / 2
    other = sum(sum(flops[name].values()) for name in OTHER_PRODUCTS)
    return Roofline(
        linears_seconds=sum(
            work / linears_tflops(products[kind]) / 1e12 for work, kind in zip((first, half, half), kinds, strict=True)
        ),
        other_seconds=other / linears_tflops(products[BF16]) / 1e12,
        attention_seconds=ATTENTION_WORK * flops["attention"]["forward"] / attention / 1e12,
        step_seconds=profile["step_seconds"]["p50"],
    )
