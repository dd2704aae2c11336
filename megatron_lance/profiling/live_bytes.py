"""Bytes that are alive while something runs, counted exactly on any device.

Station: a forward and backward pass -> [peak bytes] -> throughput report, and the check of the memory formulas.  Counts
the storages of all tensors that operators return while it is entered; what was there before is not counted, nor is
scratch space inside an operator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts live bytes while it is entered.

    Args:
        elsewhere: bytes of them that would not be on the device: what offload keeps on the host.

    Attributes:
        live: bytes now.
        peak: most bytes at a time.
    """

    def __init__(self, elsewhere: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self.elsewhere = elsewhere
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and note the storages it made."""
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and _address(x) not in given]
        for tensor in made:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)
        if made:
            self._look()
        return result

    def _look(self) -> None:
        """Add up what is alive; sizes are read again, as recompute empties the storages of tensors that stay."""
        alive = {address: storage for address, known in self._known.items() if (storage := known()) is not None}
        self.live = sum(storage.nbytes() for storage in alive.values()) - self.elsewhere()
        self.peak = max(self.peak, self.live)
        self._known = {address: self._known[address] for address in alive}


def _address(tensor: torch.Tensor) -> int:
    """Of the storage itself, not of its data: the same for all views."""
    return int(tensor.untyped_storage()._cdata)
