"""The expert-sorted layout: where each token of a pack lies on each rank (design, expert-sorted layout).

Station: pack -> [layout] -> dispatch.  On every context-parallel rank the rows are [und region | gen region], each
padded to a multiple of alignment * tp, so that a tensor-parallel rank holds [und shard | gen shard] and every expert
linear sees a slice.  The number of rows per rank depends on the capacity alone, so pipeline shapes are constant for
a run; how it splits between the regions depends on the pack.  Every region has at least one row on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lance.packing.attention_plan import AttentionPlan, Range
from megatron_lance.packing.balance import deal_queries
from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import VAE_KINDS, Expert

PADDING = -1
"""Row content that is no token."""

IntArray = npt.NDArray[np.int64]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def rows_per_rank(capacity: int, cp: int, tp: int, alignment: int) -> int:
    """Rows of one context-parallel rank (all its tensor-parallel shards together).

    Large enough for every pack of at most `capacity` tokens: a rank gets at most ceil(capacity / cp) + 1 tokens, dealt
    region by region, and rounding two regions up to a step costs at most one step more than rounding their sum.

    Args:
        capacity: tokens of a full pack.
        cp: context-parallel ranks.
        tp: tensor-parallel ranks.
        alignment: rows; a region's share per tensor-parallel rank is a multiple of it.
    """
    step = alignment * tp
    return _round_up(-(-capacity // cp), step) + step


def token_experts(pack: Pack) -> npt.NDArray[np.bool_]:
    """Bool [L] in pack order: True where the generation expert processes the token."""
    gen = np.zeros(pack.length, dtype=bool)
    for placed in pack.visual_segments(*VAE_KINDS):
        start, stop = placed.content
        gen[start:stop] = True
    return gen


@dataclass(frozen=True)
class Layout:
    """Rows of a pack, or of a part of its tokens, on all ranks of a replica.

    Attributes:
        cp: context-parallel ranks.
        tp: tensor-parallel ranks that each hold a shard of the rows.
        und_rows: rows of the und region of one context-parallel rank, padding included.
        gen_rows: rows of the gen region of one context-parallel rank, padding included.
        tokens: int64 [cp, und_rows + gen_rows], the pack-order token of each row, PADDING for padding rows.
        length: real tokens of the pack, with or without rows.
        small: whether the (und, gen) region has fewer tokens than one step of the alignment, alignment * tp rows, on
            every context-parallel rank; such a region is not worth FP8.
    """

    cp: int
    tp: int
    und_rows: int
    gen_rows: int
    tokens: IntArray
    length: int
    small: tuple[bool, bool]

    @classmethod
    def build(cls, pack: Pack, cp: int, tp: int, alignment: int, part: npt.NDArray[np.bool_] | None = None) -> Layout:
        """The layout of a pack for the given degrees; the same on every rank that computes it.

        Args:
            pack: the structure.
            cp: context-parallel ranks.
            tp: tensor-parallel ranks.
            alignment: rows; a region's share per tensor-parallel rank is a multiple of it.
            part: bool [L], the tokens that get rows, when the keys and values of the others are already known; None:
                all, and as many rows as a pack of full capacity needs.

        Raises:
            ValueError: if the part is empty.
        """
        gen_mask = token_experts(pack)
        held = np.ones(pack.length, dtype=bool) if part is None else part
        if not held.any():
            raise ValueError(f"part of a pack of {pack.length} tokens: has none of them; leave the pass out")
        experts = (np.flatnonzero(held & ~gen_mask), np.flatnonzero(held & gen_mask))
        und, gen = deal_queries(AttentionPlan.from_pack(pack), experts, cp)
        total = rows_per_rank(pack.capacity if part is None else int(held.sum()), cp, tp, alignment)
        most = [max(map(len, region)) for region in (und, gen)]
        und_rows = _round_up(max(1, most[0]), alignment * tp)
        gen_rows = total - und_rows
        tokens = np.full((cp, total), PADDING, dtype=np.int64)
        for rank in range(cp):
            tokens[rank, : len(und[rank])] = und[rank]
            tokens[rank, und_rows : und_rows + len(gen[rank])] = gen[rank]
        small = (most[0] < alignment * tp, most[1] < alignment * tp)
        return cls(cp, tp, und_rows, gen_rows, tokens, pack.length, small)

    @property
    def rows(self) -> int:
        """Rows of one context-parallel rank."""
        return self.und_rows + self.gen_rows

    @property
    def shard_rows(self) -> tuple[int, int]:
        """(und, gen) rows of one tensor-parallel rank."""
        return self.und_rows // self.tp, self.gen_rows // self.tp

    def region_tokens(self, expert: Expert, cp_rank: int) -> IntArray:
        """int64 [region rows]: the token of each row of an expert's region on one context-parallel rank."""
        row = self.tokens[cp_rank]
        return row[: self.und_rows] if expert is Expert.UND else row[self.und_rows :]

    def shard_tokens(self, expert: Expert, cp_rank: int, tp_rank: int) -> IntArray:
        """int64 [region rows / tp]: the token of each row of an expert's shard on one rank."""
        size = (self.und_rows if expert is Expert.UND else self.gen_rows) // self.tp
        return self.region_tokens(expert, cp_rank)[tp_rank * size : (tp_rank + 1) * size]

    def query_rows(self, cp_rank: int) -> IntArray:
        """Rows of a context-parallel rank that hold tokens, in pack order of their tokens."""
        rows = np.flatnonzero(self.tokens[cp_rank] != PADDING)
        return rows[np.argsort(self.tokens[cp_rank][rows], kind="stable")]

    def query_ranges(self, cp_rank: int) -> tuple[Range, ...]:
        """The pack-order ranges of the queries of a context-parallel rank."""
        tokens = self.tokens[cp_rank][self.query_rows(cp_rank)]
        runs = np.split(tokens, np.flatnonzero(np.diff(tokens) != 1) + 1)
        return tuple((int(run[0]), int(run[-1]) + 1) for run in runs if len(run))

    def key_rows(self) -> IntArray:
        """Place of each token that has a row when the und regions of all ranks and then their gen regions are joined.

        int64 [tokens with rows], ascending by token.
        """
        joined = np.concatenate([self.tokens[:, : self.und_rows].ravel(), self.tokens[:, self.und_rows :].ravel()])
        held = np.flatnonzero(joined != PADDING)
        return held[np.argsort(joined[held], kind="stable")]

    def held_tokens(self) -> IntArray:
        """The tokens that have a row, ascending: int64 [tokens with rows]."""
        return np.sort(self.tokens[self.tokens != PADDING])

    def describe(self) -> str:
        """The layout as text: a line per rank."""
        lines = [f"{self.length} tokens on cp {self.cp} x tp {self.tp}: {self.rows} rows per cp rank"]
        for rank in range(self.cp):
            und = int((self.region_tokens(Expert.UND, rank) != PADDING).sum())
            gen = int((self.region_tokens(Expert.GEN, rank) != PADDING).sum())
            lines.append(
                f"  cp rank {rank}: und {und}/{self.und_rows} rows, gen {gen}/{self.gen_rows} rows, "
                f"padding {100 * (1 - (und + gen) / self.rows):.1f}%"
            )
        return "\n".join(lines)
