"""What the collectives of a layer move, by formula and counted.

Station: model and degrees -> [bytes per layer] -> benchmarks and planner.  Bytes are those one rank receives, or for
reductions sends: (n - 1) / n of a gathered or scattered tensor among n ranks.

Symbols: R rows of a cp rank, h hidden, np and ng query and key/value heads of the model, hn head channels, w bytes per
value of the model's precision; gradients of keys and values travel in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lance.config.schema import ModelConfig


@dataclass(frozen=True)
class LayerTraffic:
    """Bytes of one layer and micro-batch on one rank.

    Attributes:
        forward: bytes.
        backward: bytes.
    """

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


def _moved(values: float, ranks: int) -> float:
    return values * (ranks - 1) / ranks


def _local_heads(model: ModelConfig, tp: int) -> tuple[int, int]:
    """Query and key/value heads of one tp rank; beyond the key/value heads each rank holds one of them."""
    return model.num_attention_heads // tp, max(model.num_query_groups // tp, 1)


def gathered_keys_values(model: ModelConfig, rows: int, cp: int, tp: int, width: int) -> LayerTraffic:
    """Context parallelism as done here: K and V gathered, their float32 gradients reduce-scattered; any cp and tp."""
    values = 2 * rows * cp * _local_heads(model, tp)[1] * model.kv_channels
    return LayerTraffic(_moved(values * width, cp), _moved(values * 4, cp))


def ring(model: ModelConfig, rows: int, cp: int, tp: int, width: int) -> LayerTraffic:
    """Ring attention: K and V pass every rank; in backward again, with their float32 gradients."""
    values = 2 * rows * cp * _local_heads(model, tp)[1] * model.kv_channels
    return LayerTraffic(_moved(values * width, cp), _moved(values * (width + 4), cp))


def head_splitting(model: ModelConfig, rows: int, cp: int, tp: int, width: int) -> LayerTraffic | None:
    """All-to-all of q, k, v and the output; None where tp x cp exceeds the key/value heads."""
    if tp * cp > model.num_query_groups:
        return None
    queries, keys = _local_heads(model, tp)
    values = rows * (2 * queries + 2 * keys) * model.kv_channels
    return LayerTraffic(_moved(values * width, cp), _moved(values * width, cp))


def qkv_over_tp(model: ModelConfig, rows: int, tp: int, width: int) -> LayerTraffic:
    """What tensor parallelism beyond the key/value heads adds: QKV gathered over tp, its gradient reduce-scattered."""
    if tp <= model.num_query_groups:
        return LayerTraffic(0.0, 0.0)
    values = rows * (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    return LayerTraffic(_moved(values * width, tp), _moved(values * width, tp))


def sequence_parallel(model: ModelConfig, rows: int, tp: int, width: int) -> LayerTraffic:
    """Gathers and scatters around the four linears; backward gathers the inputs of two of them again."""
    values = _moved(rows * model.hidden_size * width, tp)
    return LayerTraffic(4 * values, 6 * values)


class CollectiveCounter(TorchDispatchMode):
    """Counts what collectives move while it is entered.

    Attributes:
        moved: bytes, by name of the process group.

    Raises:
        NotImplementedError: on a collective that it cannot count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note a collective, then run it."""
        name = str(getattr(func, "_schema", func)).split("(")[0]
        if name in _COUNTED:
            place, times = _COUNTED[name]
            whole = args[place] if isinstance(args[place], (list, tuple)) else [args[place]]
            boxed = next(a for a in args if isinstance(a, torch.ScriptObject))
            group = torch.distributed.ProcessGroup.unbox(boxed)
            size = sum(tensor.numel() * tensor.element_size() for tensor in whole)
            share = (group.size() - 1) / group.size() if times else 1.0
            self.moved[group.group_name] += round(size * share * max(times, 1))
        elif name.startswith(("c10d::", "_c10d_functional::")) and name != "c10d::recv_":
            raise NotImplementedError(f"{name}: this collective is not counted")
        return func(*args, **(kwargs or {}))


_COUNTED = {
    "c10d::_allgather_base_": (0, 1),
    "c10d::_reduce_scatter_base_": (1, 1),
    "c10d::allgather_into_tensor_coalesced_": (0, 1),
    "c10d::reduce_scatter_tensor_coalesced_": (1, 1),
    "c10d::allreduce_": (0, 2),
    "c10d::allreduce_coalesced_": (0, 2),
    "c10d::send": (0, 0),
}
"""Counted collectives: which argument holds the rows of all ranks, and how often (n - 1) / n of it passes a rank; a
send passes once, whole, and is not counted again where it is received."""
