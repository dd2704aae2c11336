"""Positions of a pack: 3D rotary coordinates with MaPE (spec/model.md section 4).

Station: pack -> [positions] -> layer.  In: a pack.  Out: integer coordinates (temporal, height, width) of every
token, in pack order.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

from megatron_lance.packing.sample import Pack, Sample
from megatron_lance.packing.segment import Segment, SegmentKind

TEMPORAL_STRIDE = 2
"""Temporal coordinate of neighbouring latent or ViT frames: tokens_per_second 2 x 1.0 second per grid."""

IntArray = npt.NDArray[np.int64]


class Mape(StrEnum):
    """Which modality-aware rule moves the base positions (spec/model.md section 8)."""

    RELEASE = "release"
    """Re-anchored to absolute temporal positions; an edit's target copies its source's coordinates."""
    PAPER = "paper"
    """Temporal axis + i * step: 0 for noisy VAE, 1 for ViT, 2 for clean VAE."""
    NONE = "none"
    """Base positions only."""


def _grid_offsets(grid: tuple[int, int, int]) -> IntArray:
    """Offsets [3, T*H*W] of the cells of a grid from the block's base."""
    t, h, w = np.indices(grid).reshape(3, -1)
    return np.stack([TEMPORAL_STRIDE * t, h, w]).astype(np.int64)


def _segment_positions(segment: Segment, counter: int) -> tuple[IntArray, int]:
    """Base positions [3, length] of a segment that starts at `counter`, and the counter behind it."""
    if segment.grid is None:
        line = np.arange(counter, counter + segment.length, dtype=np.int64)
        return np.broadcast_to(line, (3, segment.length)), counter + segment.length
    base = counter + 1  # the start marker took `counter`
    t, h, w = segment.grid
    after = base + max(TEMPORAL_STRIDE * (t - 1), h - 1, w - 1) + 1
    content = base + _grid_offsets(segment.grid)
    start, end = np.full((3, 1), counter, np.int64), np.full((3, 1), after, np.int64)
    return np.concatenate([start, content, end], axis=1), after + 1


def base_positions(sample: Sample) -> IntArray:
    """Positions of one sample by the base rule, before MaPE.

    Returns:
        int64 [3, length]: temporal, height, width.
    """
    blocks, counter = [], 0
    for segment in sample.segments:
        block, counter = _segment_positions(segment, counter)
        blocks.append(block)
    return np.concatenate(blocks, axis=1)


def _rows_by_kind(sample: Sample) -> dict[SegmentKind, IntArray]:
    """Sample-relative token indices of each visual kind, markers included."""
    rows: dict[SegmentKind, list[IntArray]] = {}
    at = 0
    for segment in sample.segments:
        rows.setdefault(segment.kind, []).append(np.arange(at, at + segment.length))
        at += segment.length
    return {kind: np.concatenate(parts) for kind, parts in rows.items()}


def _release(positions: IntArray, sample: Sample, step: int) -> IntArray:
    """The released model's rule: ViT anchored at step, references at 2 * step, an edit's target on its source."""
    out = positions.copy()
    rows = _rows_by_kind(sample)
    vit, clean, noise = (rows.get(k) for k in (SegmentKind.VIT, SegmentKind.CLEAN, SegmentKind.NOISE))
    if vit is not None:
        out[0, vit] += step - positions[0, vit[0]]
    if clean is not None and sample.task.is_subject_driven:
        out[0, clean] += 2 * step - positions[0, clean[0]]
    if clean is not None and sample.task.is_edit and noise is not None and len(clean) == len(noise):
        out[:, noise] = positions[:, clean]
    return out


def _paper(positions: IntArray, sample: Sample, step: int) -> IntArray:
    """The paper's rule: each modality group is moved along time by a multiple of `step`."""
    out = positions.copy()
    rows = _rows_by_kind(sample)
    for kind, multiple in ((SegmentKind.VIT, 1), (SegmentKind.CLEAN, 2)):
        if kind in rows:
            out[0, rows[kind]] += multiple * step
    return out


def sample_positions(sample: Sample, mape: Mape, step: int) -> IntArray:
    """Positions of one sample with MaPE.

    Args:
        sample: the structure.
        mape: which rule.
        step: temporal distance between modality groups (1000 in paper and release).

    Returns:
        int64 [3, length].
    """
    positions = base_positions(sample)
    if mape is Mape.RELEASE:
        return _release(positions, sample, step)
    if mape is Mape.PAPER:
        return _paper(positions, sample, step)
    return positions


def pack_positions(pack: Pack, mape: Mape, step: int) -> IntArray:
    """Positions of all tokens of a pack, each sample counted from 0.

    Returns:
        int64 [3, L] in pack order.
    """
    return np.concatenate([sample_positions(s, mape, step) for s in pack.samples], axis=1)
