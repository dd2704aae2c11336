"""Media readers that meet their fate in the process they are copied into; light to import, for each of them does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_lance.data.decode import DecodeRequest, MediaError, MediaReader, ReadMedia


class FatefulReader(MediaReader):
    """A reader that meets its fate at one picture.

    Args:
        fate: hang | die | die once (while `mark` does not exist) | die at all, whatever picture it is.
        data: bytes of the picture.
        mark: a path.
    """

    def __init__(self, fate: str, data: bytes, mark: Path) -> None:
        super().__init__("host", 1)
        self._fate, self._data, self._mark = fate, data, mark

    def __reduce__(self) -> tuple[object, ...]:
        return FatefulReader, (self._fate, self._data, self._mark)

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[ReadMedia | MediaError]:
        if self._fate == "die at all" or any(request.data == self._data for request in requests):
            if self._fate == "hang":
                time.sleep(3600)
            if self._fate != "die once" or not self._mark.exists():
                self._mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(requests)


class NoRoomReader(MediaReader):
    """A reader in whose process results of a kind of task find no room in shared memory."""

    def __init__(self, kind: str) -> None:
        super().__init__("host", 1)
        self._kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return _without_room, (self._kind,)


def _without_room(kind: str) -> MediaReader:
    share = torch.Tensor.share_memory_

    def full(self: torch.Tensor) -> torch.Tensor:
        if (self.dtype == torch.int64) == (kind == "TextTask"):
            raise RuntimeError("No space left on device")
        return share(self)

    torch.Tensor.share_memory_ = full  # type: ignore[method-assign]  # in a worker
    return NoRoomReader(kind)


class UnbornReader(MediaReader):
    """A reader whose copies end the process they are made in."""

    def __reduce__(self) -> tuple[object, ...]:
        return os._exit, (1,)
