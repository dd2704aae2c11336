"""Which context-parallel rank computes which queries: equal rows and nearly equal attention work.

Station: pack, attention plan -> [balance] -> layout.  The tokens of each expert are cut into chunks, the same number
for every rank; chunks are dealt so that the ranks' attention work, counted in tiles as attention kernels compute it, is
nearly equal, while every rank gets the same rows of each expert (to one).  Pure numbers, the same on every rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lance.packing.attention_plan import AttentionPlan

IntArray = npt.NDArray[np.int64]

TILE = 128
"""Rows and columns of a tile: attention kernels compute whole tiles of the mask."""
MIN_CHUNK_ROWS = 128
"""Chunks are at least this long unless the expert has fewer tokens per rank."""
MAX_CHUNKS_PER_RANK = 24
"""Of one expert; more balance better and cut the pack into more slices."""
FEW_CHUNKS_PER_RANK = 12
"""Fewer balance badly; between the two the number is chosen for full tiles."""
SWAPS = 200
"""Most exchanges of chunks after the first dealing."""
PARTNERS = 6
"""Idlest ranks that the busiest tries to exchange with."""
GOOD_ENOUGH = 1.004
"""Stop exchanging when the busiest rank has at most this times the mean work."""


def tile_costs(plan: AttentionPlan) -> IntArray:
    """Tiles that attention computes for each slice of a plan: int64 [slices].

    A slice is cut into blocks of TILE queries; a block computes the key tiles up to the last key that its last query
    sees.
    """
    costs = []
    for piece in plan.slices:
        last = np.minimum(np.arange(TILE, piece.num_queries + TILE, TILE), piece.num_queries)  # query behind each block
        seen = piece.num_keys - piece.num_queries + last if piece.causal else np.full_like(last, piece.num_keys)
        costs.append(int((-(-seen // TILE)).sum()))
    return np.array(costs, dtype=np.int64)


def chunks_per_rank(tokens: int, ranks: int) -> int:
    """How many chunks of one expert every rank gets: those whose rows fill their tiles best, of those the most."""
    rows = math.ceil(tokens / ranks)
    most = min(MAX_CHUNKS_PER_RANK, max(1, tokens // (MIN_CHUNK_ROWS * ranks)))
    choices = range(most, max(1, min(FEW_CHUNKS_PER_RANK, most)) - 1, -1)
    return min(choices, key=lambda count: count * math.ceil(math.ceil(rows / count) / TILE))


@dataclass(frozen=True)
class _Work:
    """Attention work by query token.

    Attributes:
        slice_of: int64 [L], the slice a query belongs to.
        seen: int64 [L], keys it sees.
    """

    slice_of: IntArray
    seen: IntArray

    @classmethod
    def of(cls, plan: AttentionPlan) -> _Work:
        """Of every token of a plan's pack."""
        slice_of, seen = np.zeros(plan.length, np.int64), np.zeros(plan.length, np.int64)
        for number, piece in enumerate(plan.slices):
            start, stop = piece.query
            slice_of[start:stop] = number
            seen[start:stop] = np.arange(piece.num_keys - (stop - start), piece.num_keys) + 1
            if not piece.causal:
                seen[start:stop] = piece.num_keys
        return cls(slice_of, seen)

    def of_chunks(self, tokens: IntArray, edges: IntArray) -> npt.NDArray[np.float64]:
        """Tiles of each chunk of ascending `tokens` between consecutive `edges`: float64 [chunks].

        A chunk is cut where a slice or a run of tokens ends; a causal piece counts with its mean keys.
        """
        if not len(tokens):
            return np.zeros(len(edges) - 1)
        inner = np.flatnonzero((np.diff(tokens) != 1) | (np.diff(self.slice_of[tokens]) != 0)) + 1
        starts = np.unique(np.concatenate([edges[:-1][edges[:-1] < len(tokens)], inner]))
        rows = np.diff(np.append(starts, len(tokens)))
        keys = np.add.reduceat(self.seen[tokens], starts) / rows
        tiles = np.ceil(rows / TILE) * np.ceil(keys / TILE)
        chunk = np.searchsorted(edges, starts, side="right") - 1
        return np.bincount(chunk, weights=tiles, minlength=len(edges) - 1).astype(np.float64)


def _first_dealing(costs: Sequence[npt.NDArray[np.float64]], per_rank: Sequence[int], ranks: int) -> list[IntArray]:
    """Rank of every chunk: the costliest first, each to the rank with the least work that has room for its expert."""
    order = sorted(((-cost, e, i) for e, of_expert in enumerate(costs) for i, cost in enumerate(of_expert)))
    room = [[n] * ranks for n in per_rank]
    owners = [np.zeros(len(of_expert), np.int64) for of_expert in costs]
    loads = [(0.0, rank) for rank in range(ranks)]
    for negative, expert, chunk in order:
        full = []
        while not room[expert][loads[0][1]]:
            full.append(heapq.heappop(loads))
        load, rank = heapq.heappop(loads)
        room[expert][rank] -= 1
        owners[expert][chunk] = rank
        for entry in [*full, (load - negative, rank)]:
            heapq.heappush(loads, entry)
    return owners


@dataclass
class _Dealing:
    """Chunks of all experts, their costs and owners.

    Attributes:
        costs: per expert float64 [chunks], tiles.
        lengths: per expert int64 [chunks]; only chunks of one length are exchanged.
        owners: per expert int64 [chunks], ranks; changed in place.
    """

    costs: list[npt.NDArray[np.float64]]
    lengths: list[IntArray]
    owners: list[IntArray]

    def best_swap(self, high: int, low: int, gap: float) -> tuple[float, int, int, int]:
        """The exchange that best halves the gap between two ranks: (work moved, expert, chunk of high, of low)."""
        best = (0.0, -1, -1, -1)
        for expert, (cost, length, owner) in enumerate(zip(self.costs, self.lengths, self.owners, strict=True)):
            ours, theirs = np.flatnonzero(owner == high), np.flatnonzero(owner == low)
            moved = np.where(length[ours][:, None] == length[theirs], cost[ours][:, None] - cost[theirs], np.inf)
            i, j = np.unravel_index(np.argmin(np.abs(moved - gap / 2)), moved.shape)
            if abs(moved[i, j] - gap / 2) < abs(best[0] - gap / 2):
                best = (float(moved[i, j]), expert, int(ours[i]), int(theirs[j]))
        return best

    def improve(self, ranks: int) -> None:
        """Exchange chunks between the busiest and the idlest ranks while that lowers the busiest's work."""
        loads = np.zeros(ranks)
        for owner, cost in zip(self.owners, self.costs, strict=True):
            loads += np.bincount(owner, weights=cost, minlength=ranks)
        for _ in range(SWAPS):
            high = int(np.argmax(loads))
            if loads[high] <= GOOD_ENOUGH * loads.mean():
                return
            for low in np.argsort(loads, kind="stable")[: min(ranks - 1, PARTNERS)]:
                gap = loads[high] - loads[low]
                moved, expert, ours, theirs = self.best_swap(high, int(low), gap)
                if 0.0 < moved < gap:
                    break
            else:
                return
            self.owners[expert][ours], self.owners[expert][theirs] = low, high
            loads[high] -= moved
            loads[low] += moved


def _lengths(tokens: int, owner: IntArray, per_rank: int, ranks: int) -> IntArray:
    """Chunk lengths that sum to `tokens`: ranks' tokens differ by one at most, chunks of a rank too."""
    rows = tokens // ranks + (np.arange(ranks) < tokens % ranks)
    turn = np.zeros(len(owner), np.int64)  # which of its rank's chunks a chunk is
    for rank in range(ranks):
        turn[owner == rank] = np.arange(per_rank)
    return rows[owner] // per_rank + (turn < rows[owner] % per_rank)


def deal_queries(plan: AttentionPlan, experts: Sequence[IntArray], ranks: int) -> list[list[IntArray]]:
    """Deal the query tokens of each expert to context-parallel ranks.

    Chunks are dealt as if all were equally long; then their lengths are made such that every rank gets the same rows,
    and chunks of one length are exchanged once more for the work they now hold.

    Args:
        plan: of the pack.
        experts: ascending pack-order tokens of each expert; together all of the pack's.
        ranks: context-parallel size.

    Returns:
        For each expert, for each rank, its ascending tokens.
    """
    if ranks == 1:
        return [[tokens] for tokens in experts]
    work = _Work.of(plan)
    counts = [chunks_per_rank(len(tokens), ranks) for tokens in experts]
    edges = [np.linspace(0, len(t), n * ranks + 1).astype(np.int64) for t, n in zip(experts, counts, strict=True)]
    costs = [work.of_chunks(*pair) for pair in zip(experts, edges, strict=True)]
    owners = _first_dealing(costs, counts, ranks)
    first = _Dealing(costs, [np.ones(len(cost), np.int64) for cost in costs], owners)
    first.improve(ranks)
    lengths = [_lengths(len(t), o, n, ranks) for t, o, n in zip(experts, owners, counts, strict=True)]
    edges = [np.concatenate([[0], np.cumsum(length)]) for length in lengths]
    last = _Dealing([work.of_chunks(*pair) for pair in zip(experts, edges, strict=True)], lengths, owners)
    last.improve(ranks)
    return [_gather(*args, ranks) for args in zip(experts, edges, owners, strict=True)]


def _gather(tokens: IntArray, edges: IntArray, owner: IntArray, ranks: int) -> list[IntArray]:
    """The tokens of each rank's chunks."""
    chunks = np.split(tokens, edges[1:-1])
    return [np.concatenate([chunks[i] for i in np.flatnonzero(owner == rank)]) for rank in range(ranks)]
