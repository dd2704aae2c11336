"""What a device does at most: copies, and matrix products in the sizes of a Lance-3B layer.

Station: device -> [ceilings] -> benchmarks of attention and of whole steps, which are held against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import ScalingType, scaled_mm

from megatron_lance.config.schema import ModelConfig
from megatron_lance.profiling.benchmarks.timing import percentiles, run_times

MODEL = ModelConfig()
BF16, FP8_FAST, FP8_EXACT, FP8_BLOCKS, FP8_ROWS = KINDS = ("bf16", "fp8 fast", "fp8 exact", "fp8 blocks", "fp8 rows")
"""Products: in FP8 with a scale per tensor, fast or exact accumulation, or with one per 1 x 128 values of the first
factor and 128 x 128 ("blocks") or 1 x 128 ("rows") of the second."""
_BLOCK = 128
_FP8_CAPABILITY = (8, 9)
_FAILURES = (RuntimeError, ValueError, TypeError)
"""Of products that this version of torch or this device does not have."""


def layer_shapes(rows: int) -> dict[str, tuple[int, int, int]]:
    """(rows, inputs, outputs) of each linear of an expert, and of a large square product."""
    heads = (MODEL.num_attention_heads + 2 * MODEL.num_query_groups) * MODEL.kv_channels
    hidden, ffn = MODEL.hidden_size, MODEL.ffn_hidden_size
    return {
        "square": (rows, rows, rows),
        "qkv": (rows, hidden, heads),
        "proj": (rows, MODEL.num_attention_heads * MODEL.kv_channels, hidden),
        "fc1": (rows, hidden, 2 * ffn),
        "fc2": (rows, ffn, hidden),
    }


def _product(shape: tuple[int, int, int], kind: str, device: torch.device) -> Callable[[], torch.Tensor]:
    """A product of random values; in FP8 with scales of one and a bf16 result."""
    rows, inputs, outputs = shape
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16)
        for size in ((rows, inputs), (outputs, inputs))
    )
    if kind == BF16:
        return lambda: a @ b.t()
    return scaled_product(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), kind)


def scaled_product(a: torch.Tensor, b: torch.Tensor, kind: str) -> Callable[[], torch.Tensor]:
    """The product of two matrices in FP8, bf16 `(rows, outputs)`, with scales of one.

    Args:
        a: FP8 `(rows, inputs)`.
        b: FP8 `(outputs, inputs)`.
        kind: of KINDS but for bf16.
    """
    (rows, inputs), (outputs, _) = a.shape, b.shape
    blocks = inputs // _BLOCK

    def ones(*size: int) -> torch.Tensor:
        """float32, stored column by column."""
        return torch.ones(*reversed(size), device=a.device).t()

    scales: dict[str, tuple[Any, torch.Tensor, Any, torch.Tensor]] = {
        FP8_BLOCKS: (
            *(ScalingType.BlockWise1x128, ones(rows, blocks)),
            *(ScalingType.BlockWise128x128, ones(-(-blocks // 4) * 4, outputs // _BLOCK)),
        ),
        FP8_ROWS: (
            *(ScalingType.BlockWise1x128, ones(rows, blocks)),
            *(ScalingType.BlockWise1x128, ones(outputs, blocks)),
        ),
    }
    one = torch.ones((), device=a.device)
    of_a, scale_a, of_b, scale_b = scales.get(kind, (ScalingType.TensorWise, one, ScalingType.TensorWise, one))
    fast = kind == FP8_FAST
    return lambda: scaled_mm(a, b.t(), scale_a, of_a, scale_b, of_b, use_fast_accum=fast)


def why_not_fp8(device: torch.device) -> str:
    """Why there are no FP8 products; empty if there are."""
    if device.type != "cuda":
        return "needs a GPU"
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= _FP8_CAPABILITY else f"compute capability {capability} is below {_FP8_CAPABILITY}"


def copy_gb_per_s(size: int, repeats: int, device: torch.device) -> float:
    """GB/s, read and written, of a copy of `size` bytes."""
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / percentiles(run_times(lambda: target.copy_(source), repeats, device))["p50_ms"] / 1e6


def measure_ceilings(rows: int, copied: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Copy bandwidth and product rates.

    Args:
        rows: of the products.
        copied: bytes of the copy.
        repeats: timed runs of each.
        device: to measure.

    Returns:
        copy_gb_per_s; tflops by kind (KINDS) and shape; absent: kind -> reason.
    """
    found: dict[str, Any] = {"copy_gb_per_s": copy_gb_per_s(copied, repeats, device), "rows": rows}
    found |= {"tflops": {}, "absent": {}}
    for kind in KINDS:
        reason = "" if kind == BF16 else why_not_fp8(device)
        try:
            rates = {} if reason else _rates(kind, rows, repeats, device)
        except _FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            found["absent"][kind] = reason
        else:
            found["tflops"][kind] = rates
    return found


def _rates(kind: str, rows: int, repeats: int, device: torch.device) -> dict[str, float]:
    """TFLOP/s of one kind of products by shape."""
    return {
        name: 2e-9 * math.prod(shape) / percentiles(run_times(_product(shape, kind, device), repeats, device))["p50_ms"]
        for name, shape in layer_shapes(rows).items()
    }
