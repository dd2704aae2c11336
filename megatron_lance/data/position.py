"""Which global batch a step trains on: the step's number, and what the run leaves out.

Station: step number -> [position] -> pack index.  With the broken media this is all the data state a run has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class LeftOut(NamedTuple):
    """Global batches that a run leaves out behind a step.

    Attributes:
        after: steps done when they would have come.
        batches: how many.
    """

    after: int
    batches: int


def batch_of(step: int, left_out: Sequence[LeftOut]) -> int:
    """Number of the global batch that a step trains on, both from 0."""
    return step + sum(gap.batches for gap in left_out if gap.after <= step)


def batches_before(step: int, left_out: Sequence[LeftOut]) -> Iterator[tuple[int, int]]:
    """The global batches that the first `step` steps trained on, as [start, stop) ranges."""
    ends = [*sorted({gap.after for gap in left_out if 0 < gap.after < step}), step]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        if begin < end:
            first = batch_of(begin, left_out)
            yield first, first + end - begin


def gone_back(left_out: Sequence[LeftOut], to: int, last: int) -> list[LeftOut]:
    """What a run leaves out after it has gone back.

    Args:
        left_out: so far.
        to: steps done at the checkpoint it goes back to.
        last: steps done before; the batches of the steps in between are left out too.
    """
    kept = [gap for gap in left_out if gap.after < to]
    return [*kept, LeftOut(to, batch_of(last, left_out) - batch_of(to, kept))]
