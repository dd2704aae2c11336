"""Reading: tasks to text and decoded media, the same whatever process does it.

Station: shares -> [reading] -> encoders.  In: tasks.  Out: `PackTokens` of packs; of media items `ReadMedia`, what a
cache has of their encodings (`Encoded`), or the error that says why there is neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from megatron_lance.data.decode import MediaError, MediaReader, ReadMedia
from megatron_lance.data.encoding_cache import EncodingCache, cache_key
from megatron_lance.data.loader import PackReader
from megatron_lance.data.records import DataSetError, RecordError
from megatron_lance.data.shares import ItemKey, MediaTask, Task, TextTask
from megatron_lance.data.tasks import MediaItem
from megatron_lance.packing.batch import PackTokens


@dataclass(frozen=True)
class Encoded:
    """An encoding out of a cache.

    Attributes:
        data: [rows, width], as it was written.
    """

    data: torch.Tensor


ReadItem = ReadMedia | Encoded | ValueError
"""What came of a media item."""
Media = tuple[ReadItem, ...]
"""What came of the items of a task, in their order."""


@dataclass(frozen=True)
class StepRead:
    """What a rank has read for a step.

    Attributes:
        tokens: by pack number.
        media: by pack number and item.
    """

    tokens: dict[int, PackTokens] = field(default_factory=dict)
    media: dict[tuple[int, MediaItem], ReadItem] = field(default_factory=dict)

    @classmethod
    def of(cls, results: Iterable[tuple[Task, PackTokens | Media]]) -> StepRead:
        """Results under their addresses."""
        step = cls()
        for task, result in results:
            if isinstance(task, TextTask):
                assert isinstance(result, PackTokens)
                step.tokens[task.pack] = result
            else:
                assert isinstance(result, tuple)
                step.media.update({(task.pack, i): one for i, one in zip(task.items, result, strict=True)})
        return step


class TaskReader:
    """Does tasks; may be copied to other processes by pickling.

    Attributes:
        packs: reads text and bytes.

    Args:
        packs: of one index.
        media: decodes.
        cache: encodings that need not be made again; None: no cache.
    """

    def __init__(self, packs: PackReader, media: MediaReader, cache: EncodingCache | None = None) -> None:
        self.packs, self._media, self._cache = packs, media, cache

    def read(self, task: Task, before_decoding: Callable[[], None] = lambda: None) -> PackTokens | Media:
        """The result of a task.

        Args:
            task: what to read.
            before_decoding: called once the bytes of a picture or clip are there.

        Raises:
            PackIndexError: if a record no longer gives the planned sample.
            RecordError, DataSetError: if the text of a record cannot be read.
        """
        if isinstance(task, TextTask):
            return self.packs.tokens(task.pack)
        try:
            requests = self.packs.requests(task.pack, task.items)
        except (RecordError, DataSetError) as error:
            return (error,) * len(task.items)
        if self._cache is None:
            before_decoding()
            return tuple(self._media(requests))
        keys = [cache_key(request) for request in requests]
        known = {key: Encoded(found) for key in keys if (found := self._cache.get(key)) is not None}
        before_decoding()
        read = iter(self._media([request for request, key in zip(requests, keys, strict=True) if key not in known]))
        return tuple(known.get(key) or _with_key(next(read), key) for key in keys)

    def step(self, tasks: Iterable[Task], known: Mapping[ItemKey, str]) -> StepRead:
        """The results of some tasks; errors as of `read`.

        Args:
            tasks: to do.
            known: cause by item, of those that are not to be tried.
        """

        def result(task: Task) -> PackTokens | Media:
            cause = known.get(task.key) if isinstance(task, MediaTask) else None
            return without(task, cause) if cause and isinstance(task, MediaTask) else self.read(task)

        return StepRead.of((task, result(task)) for task in tasks)


def _with_key(read: ReadMedia | MediaError, key: str) -> ReadMedia | MediaError:
    return replace(read, key=key) if isinstance(read, ReadMedia) else read


def without(task: MediaTask, cause: str) -> Media:
    """The result of a task that is not done."""
    return (RecordError(cause),) * len(task.items)
