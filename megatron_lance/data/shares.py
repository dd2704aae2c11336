"""Shares: which replica trains on which packs, which rank of it encodes which media, and what a rank has to read.

Station: pack index -> [shares] -> reading -> encoders.  Pure: every rank of a replica derives the same shares from the
same packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lance.data.pack_index import PlannedPack
from megatron_lance.data.tasks import MediaItem
from megatron_lance.packing.packer import deal_packs

ItemKey = tuple[str, str, int, str]
"""Source, file, row, element."""


@dataclass(frozen=True)
class MediaJob:
    """One media item of one pack: what to encode.

    Attributes:
        pack: it belongs to.
        item: what to decode.
        rows: of the encoding.
    """

    pack: PlannedPack
    item: MediaItem
    rows: int

    @property
    def pixels(self) -> int:
        """The cost by which jobs are shared out."""
        return len(self.item.frames) * self.item.size[0] * self.item.size[1]

    @property
    def address(self) -> tuple[int, MediaItem]:
        """Pack number and item; under it lies what was read."""
        return self.pack.number, self.item


@dataclass(frozen=True)
class TextTask:
    """Read the text of a pack.

    Attributes:
        pack: its number.
    """

    pack: int


@dataclass(frozen=True)
class MediaTask:
    """Read and decode a picture or clip for some media items of a pack.

    Attributes:
        pack: its number.
        items: of one key.
    """

    pack: int
    items: tuple[MediaItem, ...]

    @property
    def key(self) -> ItemKey:
        """Where the bytes are."""
        return key_of(self.items[0])


Task = TextTask | MediaTask


def key_of(item: MediaItem) -> ItemKey:
    """Where the bytes of an item are; items of several packs or encoders may share them."""
    return item.source, item.file, item.row, item.element


def share_out(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank of each job: the most expensive first, each to the rank with the least so far."""
    load = [0] * ranks
    owner = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        owner[job] = rank
        load[rank] += costs[job]
    return owner


def packs_of_replica(packs: Sequence[PlannedPack], replicas: int, replica: int) -> list[int]:
    """Which packs of a step a replica trains on: as many as any other has, and nearly the same work."""
    return deal_packs([pack.cost for pack in packs], replicas)[replica]


def shared_jobs(packs: Sequence[PlannedPack], ranks: int) -> list[tuple[MediaJob, int]]:
    """The media jobs of some packs in pack order, each with its rank of a replica."""
    jobs = []
    for pack in packs:
        segments = (p.segment for p in pack.pack.placed_segments() if p.segment.is_visual)
        jobs += [MediaJob(pack, i, s.content_length) for i, s in zip(pack.media, segments, strict=True)]
    return list(zip(jobs, share_out([job.pixels for job in jobs], ranks), strict=True))


def rank_tasks(packs: Sequence[PlannedPack], ranks: int, rank: int) -> list[Task]:
    """What a rank of a replica has to read: the text of all packs, and the media of its share, each file once a pack.

    Args:
        packs: of the replica.
        ranks: of the replica.
        rank: of this one among them.
    """
    together: dict[tuple[int, ItemKey], list[MediaItem]] = {}
    for job, owner in shared_jobs(packs, ranks):
        if owner == rank:
            together.setdefault((job.pack.number, key_of(job.item)), []).append(job.item)
    texts = [TextTask(number) for number in dict.fromkeys(pack.number for pack in packs)]
    return [*texts, *(MediaTask(number, tuple(items)) for (number, _), items in together.items())]
