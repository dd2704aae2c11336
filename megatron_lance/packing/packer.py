"""Packer: which samples share a packed sequence, and what a sample costs in attention.

Station: sample -> [packer] -> pack index.  In: sample lengths in mixture order.  Out: groups of samples, each within
the capacity.  Also the number of allowed (query, key) pairs of a sample, from its segments alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from megatron_lance.packing.segment import Segment, SegmentKind


def mask_pairs(segments: Iterable[Segment]) -> int:
    """Allowed (query, key) pairs of one sample (spec/model.md section 3).

    A token sees all earlier tokens of the sample that are not in a noise segment; inside its own segment a text
    token sees itself and what is before it, a visual token sees all.

    Args:
        segments: of one sample, in order.
    """
    pairs = visible = 0
    for segment in segments:
        n = segment.length
        pairs += n * visible + (n * n if segment.is_visual else n * (n + 1) // 2)
        if segment.kind is not SegmentKind.NOISE:
            visible += n
    return pairs


def pack_lengths(lengths: Sequence[int], capacity: int, open_packs: int = 16) -> list[tuple[int, ...]]:
    """Group samples into packs: best fit in mixture order over a few open packs.

    Each sample goes to the open pack with the least room that still holds it, so a pack mixes neighbours of the mixture
    whatever their lengths; a sample that fits nowhere opens a pack, and one too many closes the fullest.

    Args:
        lengths: tokens of each sample, in mixture order.
        capacity: tokens of a pack.
        open_packs: packs filled at a time; more fill better and keep the mixture's order less.

    Returns:
        Sample numbers of each pack, ascending inside a pack; packs in the order in which they were closed.

    Raises:
        ValueError: if a sample is longer than a pack, or open_packs is not positive.
    """
    if open_packs < 1:
        raise ValueError(f"open_packs {open_packs}: must be at least 1")
    packs: list[tuple[int, ...]] = []
    groups: dict[int, list[int]] = {}  # by its first sample
    free: list[tuple[int, int]] = []  # (free tokens, first sample) of the open packs, ascending
    for number, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"sample {number} of {length} tokens: must lie in [1, capacity {capacity}]; leave it out or raise "
                "data.seq_length"
            )
        at = bisect_left(free, (length, -1))
        room, first = free.pop(at) if at < len(free) else (capacity, number)
        groups.setdefault(first, []).append(number)
        insort(free, (room - length, first))
        if len(free) > open_packs:
            packs.append(tuple(groups.pop(free.pop(0)[1])))
    return packs + [tuple(groups[first]) for first in sorted(groups)]


def deal_packs(costs: Sequence[int], replicas: int) -> list[list[int]]:
    """Deal the packs of a global batch to replicas, the same number to each and nearly the same cost.

    The most expensive pack goes first, each to the replica with the least cost so far among those with room.

    Args:
        costs: of each pack, e.g. mask pairs.
        replicas: data-parallel size; divides the number of packs.

    Returns:
        For each replica the indices of its packs, ascending.

    Raises:
        ValueError: if the packs cannot be dealt evenly.
    """
    if replicas < 1 or len(costs) % replicas:
        raise ValueError(
            f"{len(costs)} packs to {replicas} replicas: each must get the same number; choose a "
            "training.global_batch_size that is a multiple of the data-parallel size"
        )
    room = len(costs) // replicas
    dealt: list[list[int]] = [[] for _ in range(replicas)]
    open_replicas = [(0, replica) for replica in range(replicas)]  # a heap of (cost, replica) of those with room
    for pack in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, replica = heappop(open_replicas)
        dealt[replica].append(pack)
        if len(dealt[replica]) < room:
            heappush(open_replicas, (load + costs[pack], replica))
    return [sorted(packs) for packs in dealt]
