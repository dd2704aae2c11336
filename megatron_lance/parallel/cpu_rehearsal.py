"""Run megatron-core's real parallel code on CPUs over gloo.

Station: before any process group exists.  megatron-core names its device "cuda" in many places although nothing in
the code paths used here needs a GPU.  This module, and no other, redirects those names to the CPU when no GPU is
present: device queries, RNG state access, `device="cuda"` arguments, `.cuda()` and the tensor type strings that the
distributed optimizer compares.  Where TransformerEngine or apex is installed, whose kernels megatron-core's optimizer
takes and which need a GPU, it gets what it takes without them.  Every collective, schedule and optimizer step then runs
for real.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import utils as megatron_utils
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

_KERNELS = {
    "multi_tensor_applier": megatron_utils.local_multi_tensor_applier,
    "multi_tensor_scale_impl": megatron_utils.local_multi_tensor_scale,
}
_OPTIMIZER: dict[str, dict[str, Any]] = {
    "": {"Adam": torch.optim.AdamW, "SGD": torch.optim.SGD, "USING_PYTORCH_OPTIMIZER": True},
    ".distrib_optimizer": dict.fromkeys(("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"), False),
    ".optimizer": _KERNELS,
    ".clip_grads": {**_KERNELS, "l2_norm_impl": megatron_utils.local_multi_tensor_l2_norm},
}
"""What megatron-core's optimizer takes without TransformerEngine and apex, by its module."""

replaced: list[tuple[Any, str, Any]] = []
"""(module, name, value) of what it had taken of them."""


def _replace_gpu_optimizers() -> None:
    for name, values in _OPTIMIZER.items():
        module = importlib.import_module(f"megatron.core.optimizer{name}")
        for key, value in values.items():
            replaced.append((module, key, getattr(module, key)))
            setattr(module, key, value)


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
        if find_spec("transformer_engine") or find_spec("amp_C"):
            _replace_gpu_optimizers()
        _mode = _CudaNamesToCpu()
        _mode.__enter__()
        logger.info("no GPU: megatron-core runs on the CPU over gloo")
    return True
