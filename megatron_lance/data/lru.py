"""LRU: a bounded cache within a process.

Station: used by [row groups].  In: values with their weights.  Out: the same values; what was used least recently is
dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class Lru:
    """Values by key, bounded by total weight; the newest value stays even if it alone is heavier.

    Args:
        bound: of the total weight.
        dispose: called with values that are dropped.
        unit: of a key; values of the newest one's unit stay with it.
    """

    def __init__(
        self, bound: int, dispose: Callable[[Any], None] | None = None, unit: Callable[[Any], Any] = lambda key: key
    ) -> None:
        self._bound, self._dispose, self._unit = bound, dispose, unit
        self._values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._weight = 0

    def drop(self, key: Any) -> None:
        """Forget the value of `key`, if there is one."""
        value, weight = self._values.pop(key, (None, 0))
        self._weight -= weight
        if value is not None and self._dispose is not None:
            self._dispose(value)

    def get(self, key: Any, make: Callable[[], tuple[Any, int]]) -> Any:
        """The value of `key`; `make` gives (value, weight) where it is absent."""
        if key not in self._values:
            self._values[key] = make()
            self._weight += self._values[key][1]
            self._shrink(self._unit(key))
        self._values.move_to_end(key)
        return self._values[key][0]

    def _shrink(self, kept: Any) -> None:
        """Drop values until the bound holds, but none of a unit."""
        while self._weight > self._bound:
            oldest = next((key for key in self._values if self._unit(key) != kept), None)
            if oldest is None:
                return
            self.drop(oldest)
