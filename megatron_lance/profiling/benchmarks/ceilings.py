"""What a device does at most: copies, and matrix products in the sizes of a Lance-3B layer.

Station: device -> [ceilings] -> benchmarks of attention and of whole steps, which are held against them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_lance.config.schema import ModelConfig
from megatron_lance.profiling.benchmarks.timing import percentiles, run_times

MODEL = ModelConfig()
_FP8 = torch.float8_e4m3fn
_FP8_CAPABILITY = (8, 9)


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


def _product(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """A product of random values; FP8 with one scale per tensor and a bf16 result."""
    rows, inputs, outputs = shape
    source = torch.bfloat16 if dtype == _FP8 else dtype
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(*size, generator=generator, device=device, dtype=source).to(dtype)
        for size in ((rows, inputs), (outputs, inputs))
    )
    if dtype != _FP8:
        return lambda: a @ b.t()
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)


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
        copy_gb_per_s; tflops by type (bfloat16, float8_e4m3fn) and shape; absent: type -> reason.
    """
    found: dict[str, Any] = {"copy_gb_per_s": copy_gb_per_s(copied, repeats, device), "rows": rows, "tflops": {}}
    absent = {str(_FP8).removeprefix("torch."): why_not_fp8(device)}
    for dtype in (torch.bfloat16, _FP8):
        name = str(dtype).removeprefix("torch.")
        if absent.get(name):
            continue
        found["tflops"][name] = {
            shape_name: 2e-9
            * shape[0]
            * shape[1]
            * shape[2]
            / percentiles(run_times(_product(shape, dtype, device), repeats, device))["p50_ms"]
            for shape_name, shape in layer_shapes(rows).items()
        }
    return {**found, "absent": {name: reason for name, reason in absent.items() if reason}}
