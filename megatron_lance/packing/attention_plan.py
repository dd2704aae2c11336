"""The mask of a pack as a list of slices (spec/model.md section 3, design decision 3).

Station: pack -> [attention plan] -> joint attention.  Generalized 3D causal attention: token q may attend token k iff
both are in the same sample, (q >= k or both are in the same visual segment), and not (k is in a noise segment that q
is not in).  Every segment is one slice: its queries see the clean tokens before it in its sample, and itself, causally
for text and fully for visual segments.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import SegmentKind

Range = tuple[int, int]
"""[start, stop) of pack-order indices."""


def merge_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Ascending ranges with adjacent ones joined and empty ones dropped."""
    merged: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _first_keys(ranges: tuple[Range, ...], count: int) -> tuple[Range, ...]:
    """The first `count` indices of a list of ranges."""
    kept: list[Range] = []
    for start, stop in ranges:
        take = min(stop - start, count)
        if take > 0:
            kept.append((start, start + take))
            count -= take
    return tuple(kept)


@dataclass(frozen=True)
class AttentionSlice:
    """One rectangle of the mask: a query range against gathered key ranges.

    Attributes:
        query: pack-order range of the queries.
        keys: ascending, disjoint pack-order ranges of the keys.
        causal: False: every query sees every key.  True: bottom-right aligned: of n_k gathered keys, query i of n_q
            sees the first n_k - n_q + i + 1.

    Raises:
        ValueError: if a causal slice has fewer keys than queries.
    """

    query: Range
    keys: tuple[Range, ...]
    causal: bool

    def __post_init__(self) -> None:
        if self.causal and self.num_keys < self.num_queries:
            raise ValueError(f"causal slice of {self.num_queries} queries has only {self.num_keys} keys")

    @property
    def num_queries(self) -> int:
        """Rows of the rectangle."""
        return self.query[1] - self.query[0]

    @property
    def num_keys(self) -> int:
        """Columns of the rectangle."""
        return sum(stop - start for start, stop in self.keys)

    @property
    def mask_pairs(self) -> int:
        """Allowed (query, key) pairs."""
        full = self.num_queries * self.num_keys
        return full - self.num_queries * (self.num_queries - 1) // 2 if self.causal else full

    def restrict(self, start: int, stop: int) -> AttentionSlice:
        """The slice with only the queries [start, stop), a non-empty part of its own; exact for both kinds."""
        keys = self.keys
        if self.causal:
            keys = _first_keys(keys, self.num_keys - (self.query[1] - stop))
        return AttentionSlice((start, stop), keys, self.causal)


@dataclass(frozen=True)
class AttentionPlan:
    """All slices of a pack (or of the part of it whose queries lie on one rank).

    Attributes:
        length: real tokens of the pack.
        slices: by ascending query range; the ranges are disjoint.
        prepared: what attention backends derived from the plan, so that all layers share it; not part of its value.
    """

    length: int
    slices: tuple[AttentionSlice, ...]
    prepared: dict[tuple[str, Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_pack(cls, pack: Pack) -> AttentionPlan:
        """The plan of a pack; adjacent text segments become one slice."""
        slices: list[AttentionSlice] = []
        clean_before: list[Range] = []
        sample_index = -1
        for placed in pack.placed_segments():
            if placed.sample_index != sample_index:
                sample_index, clean_before = placed.sample_index, []
            query = (placed.start, placed.stop)
            causal = placed.segment.kind is SegmentKind.TEXT
            keys = merge_ranges([*clean_before, query])
            last = slices[-1] if slices else None
            if causal and last and last.causal and last.query[1] == placed.start and clean_before:
                slices[-1] = AttentionSlice((last.query[0], placed.stop), keys, True)
            else:
                slices.append(AttentionSlice(query, keys, causal))
            if placed.segment.kind is not SegmentKind.NOISE:
                clean_before = list(merge_ranges([*clean_before, query]))
        return cls(pack.length, tuple(slices))

    @property
    def mask_pairs(self) -> int:
        """Allowed (query, key) pairs."""
        return sum(s.mask_pairs for s in self.slices)

    def restrict(self, queries: Iterable[Range]) -> AttentionPlan:
        """The plan for a subset of the queries, given as ascending disjoint pack-order ranges."""
        kept: list[AttentionSlice] = []
        stops = [piece.query[1] for piece in self.slices]
        for start, stop in queries:
            at = bisect_right(stops, start)
            while at < len(self.slices) and self.slices[at].query[0] < stop:
                piece = self.slices[at]
                kept.append(piece.restrict(max(start, piece.query[0]), min(stop, piece.query[1])))
                at += 1
        return AttentionPlan(self.length, tuple(kept))

    def dense(self) -> npt.NDArray[np.bool_]:
        """The mask as bool [L, L] (query, key); for tests, pictures and the `dense` backend."""
        mask = np.zeros((self.length, self.length), dtype=bool)
        for piece in self.slices:
            columns = np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in piece.keys)])
            block = np.ones((piece.num_queries, piece.num_keys), dtype=bool)
            if piece.causal:
                block = np.tril(block, piece.num_keys - piece.num_queries)
            mask[piece.query[0] : piece.query[1], columns] = block
        return mask

    def cell_shares(self, cells: int) -> npt.NDArray[np.float64]:
        """Share of allowed pairs in each cell of a grid over the mask: float64 [cells, cells]."""
        edges = np.linspace(0, self.length, cells + 1).astype(np.int64)
        counts = sum(
            (_cell_counts(piece, edges - piece.query[0], edges) for piece in self.slices),
            np.zeros((cells, cells), np.int64),
        )
        return np.asarray(counts / np.outer(np.diff(edges), np.diff(edges)), np.float64)

    def tile_counts(self, tile: int, query_tiles: int, key_tiles: int) -> npt.NDArray[np.int64]:
        """Allowed pairs in each tile of `tile` x `tile`, the slices' queries one after another.

        Args:
            tile: queries and keys of a tile.
            query_tiles: tiles that hold at least all queries.
            key_tiles: tiles that hold at least all tokens.

        Returns:
            int64 [query_tiles, key_tiles].
        """
        counts = np.zeros((query_tiles, key_tiles), np.int64)
        keys, at = np.arange(key_tiles + 1) * tile, 0
        for piece in self.slices:
            first, last = at // tile, -(-(at + piece.num_queries) // tile)
            counts[first:last] += _cell_counts(piece, np.arange(first, last + 1) * tile - at, keys)
            at += piece.num_queries
        return counts

    def picture(self, width: int = 64) -> str:
        """The mask as text: one character per cell of tokens, '#' all allowed, '+' some, '.' none."""
        shares = self.cell_shares(min(width, self.length))
        symbols = np.where(shares == 0, ".", np.where(shares == 1, "#", "+"))
        return "\n".join("".join(row) for row in symbols)


def _cell_counts(
    piece: AttentionSlice, query_edges: npt.NDArray[np.int64], key_edges: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Allowed pairs of a slice in every cell of a grid: int64 [query cells, key cells].

    A query that sees the first m of the gathered keys sees, before column edge c, min(m, keys before c) of them; its
    sum over a run of queries is a difference of prefix sums over m.

    Args:
        piece: the slice.
        query_edges: of the cells, counted from the slice's first query; may lie outside of it.
        key_edges: of the cells, tokens.
    """
    before = np.zeros_like(key_edges)  # keys before an edge
    for start, stop in piece.keys:
        before += np.clip(key_edges, start, stop) - start
    within = np.clip(query_edges, 0, piece.num_queries)
    first, last = within[:-1], within[1:]
    if not piece.causal:
        return np.outer(last - first, np.diff(before))
    offset = piece.num_keys - piece.num_queries

    def seen_by_first(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sum over the first `rows` queries of min(offset + i + 1, before), [cells, edges]."""
        growing = np.clip(before[None, :] - offset, 0, rows[:, None])  # queries that do not yet see all keys before
        return growing * offset + growing * (growing + 1) // 2 + (rows[:, None] - growing) * before[None, :]

    small = before < offset  # edges whose keys every query sees
    sums = [np.where(small[None, :], rows[:, None] * before[None, :], seen_by_first(rows)) for rows in (first, last)]
    return np.diff(sums[1] - sums[0], axis=1)
