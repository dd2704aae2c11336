"""Random structures for property tests: samples of every shape a task could produce, and some that none does yet."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from megatron_lance.objectives.flow_matching import draw_noise
from megatron_lance.packing.batch import PackNoise, PackTokens, PackVisuals
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import VAE_KINDS, Segment, SegmentKind

HIDDEN, CHANNELS = 6, 3
"""Widths of the ViT rows and latents that `pack_values` makes."""

VISUAL_KINDS = (SegmentKind.VIT, SegmentKind.CLEAN, SegmentKind.NOISE)
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@st.composite
def visual_segments(draw: st.DrawFn, kinds: tuple[SegmentKind, ...] = VISUAL_KINDS) -> Segment:
    """One block; a noise block may have any of its frames as conditions, also all."""
    kind, grid = draw(st.sampled_from(kinds)), draw(GRIDS)
    frames: tuple[int, ...] = ()
    if kind is SegmentKind.NOISE:
        frames = tuple(sorted(draw(st.sets(st.integers(0, grid[0] - 1), max_size=grid[0]))))
    return Segment.visual(kind, grid, frames)


def segment_lists() -> st.SearchStrategy[list[Segment]]:
    """Any order: touching blocks, several noise blocks, texts side by side, a block at the very start or end."""
    return st.lists(st.one_of(st.integers(1, 6).map(Segment.text), visual_segments()), min_size=1, max_size=6)


@st.composite
def samples(draw: st.DrawFn, sample_id: str = "sample") -> Sample:
    """A sample of any task; labels lie in text, their predicting row in the same sample."""
    segments, spans, at = draw(segment_lists()), [], 0
    for segment in segments:
        low, high = max(at, 1), at + segment.length
        at = high
        if not segment.is_visual and low < high and draw(st.booleans()):
            start = draw(st.integers(low, high - 1))
            spans.append((start, draw(st.integers(start + 1, high))))
    return Sample(sample_id, draw(st.sampled_from(list(Task))), tuple(segments), tuple(spans))


@st.composite
def packs(draw: st.DrawFn, max_samples: int = 4) -> Pack:
    """Several samples and some capacity to spare."""
    count = draw(st.integers(1, max_samples))
    chosen = tuple(draw(samples(f"sample {i}")) for i in range(count))
    return Pack(chosen, sum(s.length for s in chosen) + draw(st.integers(0, 12)))


def pack_values(
    pack: Pack, seed: int = 0, *, vocabulary: int = 1000, hidden: int = HIDDEN, channels: int = CHANNELS
) -> tuple[PackTokens, PackVisuals, PackNoise]:
    """Random token ids, ViT rows, latents and noise of a pack; every visual segment valid."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (pack.length,), generator=generator)
    n_vit = sum(p.segment.content_length for p in pack.visual_segments(SegmentKind.VIT))
    n_vae = sum(p.segment.content_length for p in pack.visual_segments(*VAE_KINDS))
    visuals = PackVisuals(
        vit=torch.randn(n_vit, hidden, generator=generator),
        latents=torch.randn(n_vae, channels, generator=generator),
        valid=torch.ones(sum(1 for p in pack.placed_segments() if p.segment.is_visual), dtype=torch.bool),
    )
    epochs = (0,) * len(pack.samples)
    noise = draw_noise(pack, epochs, channels, seed=seed, shift=2.0, distribution="logit_normal")
    return PackTokens.from_ids(pack, ids), visuals, noise
