"""Packer: which samples share a packed sequence, and what a sample costs in attention.

Station: sample -> [packer] -> pack index.  In: sample lengths in mixture order.  Out: groups of samples, each within
the capacity.  Also the number of allowed (query, key) pairs of a sample, from its segments alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

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


def pack_lengths(lengths: Sequence[int], capacity: int, window: int = 4096) -> list[tuple[int, ...]]:
    """Group samples into packs: best fit, longest first, within a window that slides over the mixture order.

    A window keeps the mixture's order on the large scale.  The emptiest pack of a window is taken apart and its
    samples go to the next one, so only the last pack of all may stay far from full.

    Args:
        lengths: tokens of each sample, in mixture order.
        capacity: tokens of a pack.
        window: samples looked at together.

    Returns:
        Sample numbers of each pack, ascending inside a pack; packs ordered by their first sample within a window.

    Raises:
        ValueError: if a sample is longer than a pack, or the window is not positive.
    """
    if window < 1:
        raise ValueError(f"window {window}: must be at least 1 sample")
    for number, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(
                f"sample {number} of {length} tokens: must lie in [1, capacity {capacity}]; leave it out or raise "
                "data.seq_length"
            )
    packs: list[tuple[int, ...]] = []
    carried: tuple[int, ...] = ()
    for start in range(0, len(lengths), window):
        stop = min(start + window, len(lengths))
        groups = _best_fit([*carried, *range(start, stop)], lengths, capacity)
        carried = ()
        if stop < len(lengths) and len(groups) > 1:
            carried = min(groups, key=lambda group: (sum(lengths[i] for i in group), group))
            groups.remove(carried)
        packs += groups
    return packs


def _best_fit(numbers: Sequence[int], lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Best-fit-decreasing of one window."""
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, group), ascending
    for number in sorted(numbers, key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[number], -1))
        if at < len(free):
            room, group = free.pop(at)
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(number)
        insort(free, (room - lengths[number], group))
    return sorted(tuple(sorted(group)) for group in groups)


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
    load = [0] * replicas
    for pack in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        replica = min((r for r in range(replicas) if len(dealt[r]) < room), key=lambda r: (load[r], r))
        dealt[replica].append(pack)
        load[replica] += costs[pack]
    return [sorted(packs) for packs in dealt]
