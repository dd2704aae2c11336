"""Run megatron-core's real parallel code on CPUs over gloo.

Station: before any process group exists.  megatron-core names its device "cuda" in many places although nothing in
the code paths used here needs a GPU.  This module, and no other, redirects those names to the CPU when no GPU is
present: device queries, RNG state access, `device="cuda"` arguments, `.cuda()` and the tensor type strings that the
distributed optimizer compares.  Every collective, schedule and optimizer step then runs for real.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaNamesToCpu(TorchFunctionMode):
    """Reads every mention of a CUDA device as the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if func is torch.Tensor.to:
            args = tuple(_CPU if _is_cuda(a) else a for a in args)
        return func(*args, **kwargs)


_mode: _CudaNamesToCpu | None = None


def _get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _do_nothing() -> Callable[..., None]:
    """A new function each time: torch.compile's tables refuse one object under several torch names."""

    def ignore(*args: Any, **kwargs: Any) -> None:
        return None

    return ignore


def start_if_needed() -> bool:
    """Redirect CUDA names to the CPU if this machine has no GPU; safe to call again.

    Returns:
        True if the process now rehearses on the CPU.
    """
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is None:
        torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
        for name in ("synchronize", "set_device", "manual_seed", "manual_seed_all", "empty_cache"):
            setattr(torch.cuda, name, _do_nothing())
        torch.cuda.get_rng_state = megatron_random._get_cuda_rng_state = _get_state
        torch.cuda.set_rng_state = megatron_random._set_cuda_rng_state = _set_state
        _mode = _CudaNamesToCpu()
        _mode.__enter__()
        logger.info("no GPU: megatron-core runs on the CPU over gloo")
    return True
