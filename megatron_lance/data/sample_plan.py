"""Sample plan: the structure of a sample from the facts of its row.

Station: facts, dropout -> [sample plan] -> packer, pack index.  In: what is known of a row, the sizes and rates of a
run.  Out: the sample, and one media item per visual segment saying which frames to decode at which size (spec/data.md
section 3, spec/model.md section 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_lance.config.schema import DataConfig, ModelConfig
from megatron_lance.data.facts import MediaFact, RowFacts, TextFacts
from megatron_lance.data.media import MediaInfo
from megatron_lance.data.records import RecordError
from megatron_lance.data.sizes import (
    VAE_STRIDE,
    VIT_PATCH,
    Sides,
    bucket_size,
    has_positions,
    sample_frames,
    vae_grid,
    vae_size,
    vit_grid,
    vit_size,
)
from megatron_lance.data.tasks import Dropout, MediaItem
from megatron_lance.packing.sample import Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind


@dataclass(frozen=True)
class Sizing:
    """What of a configuration decides the grids of visual blocks.

    Attributes:
        vae_resolution, vit_resolution: pixels.
        vae_sides, vit_sides: bounds of sizes, pixels, see `sizes.Sides`.
        target_fps: frames per second.
        max_seconds_generation, max_seconds_understanding: seconds.
        frame_sampling: release or trim.
        position_frames, position_size: bounds of the latent position table.
    """

    vae_resolution: int
    vit_resolution: int
    vae_sides: Sides
    vit_sides: Sides
    target_fps: float
    max_seconds_generation: float
    max_seconds_understanding: float
    frame_sampling: str
    position_frames: int
    position_size: int

    @classmethod
    def of(cls, config: DataConfig, model: ModelConfig) -> Sizing:
        """Of a configuration."""
        return cls(
            config.vae_resolution,
            config.vit_resolution,
            config.vae_sides,
            config.vit_sides,
            config.target_fps,
            config.max_seconds_generation,
            config.max_seconds_understanding,
            config.frame_sampling,
            model.latent_position_frames,
            model.latent_position_size,
        )


@dataclass(frozen=True)
class Place:
    """Where a row is: source, file of it, row of the file."""

    source: str
    file: str
    row: int

    @property
    def sample_id(self) -> str:
        """The row's own, see `Record.sample_id`."""
        return f"{self.source}/{self.file}/{self.row}"


@dataclass(frozen=True)
class _Shape:
    """A visual block of known size: its segment, and what to decode for it."""

    segment: Segment
    frames: tuple[int, ...]
    bucket: tuple[int, int]
    size: tuple[int, int]


def plan_sample(
    facts: RowFacts,
    place: Place,
    sample_id: str,
    task: Task,
    frame_conditions: str,
    sizing: Sizing,
    dropout: Dropout,
) -> tuple[Sample, tuple[MediaItem, ...]]:
    """The sample of a row, and a media item per visual segment, in order.

    Args:
        facts: of the row.
        place: of the row.
        sample_id: of the sample.
        task: of the source.
        frame_conditions: of the source, for I2V.
        sizing: of the run.
        dropout: what is left out.

    Raises:
        RecordError: if the row cannot be used with these sizes; the message says why and what to do.
    """
    blocks = _blocks(facts.media, task, dropout)
    gaps, (start, stop) = _gaps(facts.text, task, dropout, len(blocks), len(facts.media) - 1)
    segments: list[Segment] = []
    items: list[MediaItem] = []
    where = (place.source, place.file, place.row)
    for gap, (kind, media) in zip(gaps, blocks, strict=False):
        try:
            shape = _shape(media.info, kind, task, frame_conditions, sizing)
        except ValueError as error:
            raise RecordError(f"{place.sample_id} {media.element}: {error}") from error
        segments += [Segment.text(gap)] if gap else []
        encoder = "vit" if kind is SegmentKind.VIT else "vae"
        items.append(
            MediaItem(0, len(segments), *where, media.element, shape.frames, shape.bucket, shape.size, encoder)
        )
        segments.append(shape.segment)
    span_gap = len(blocks) - 1 if task.is_generation else len(blocks)
    behind = sum(s.length for s in segments[:-1]) if task.is_generation else sum(s.length for s in segments) + gaps[-1]
    span = (behind - gaps[span_gap] + start, behind - gaps[span_gap] + stop)
    segments += [Segment.text(gaps[-1])] if gaps[-1] else []
    labels = () if task.is_generation else (span,)
    caption = span if task.is_generation and start < stop else None
    return Sample(sample_id, task, tuple(segments), labels, caption), tuple(items)


def _blocks(media: tuple[MediaFact, ...], task: Task, dropout: Dropout) -> list[tuple[SegmentKind, MediaFact]]:
    """The visual blocks in order: of each kept condition ViT and clean, then the target; ViT for understanding."""
    if not task.is_generation:
        return [(SegmentKind.VIT, fact) for fact in media]
    kept = [fact for k, fact in enumerate(media[:-1]) if k not in dropout.conditions]
    pairs = [(kind, fact) for fact in kept for kind in (SegmentKind.VIT, SegmentKind.CLEAN)]
    return [*pairs, (SegmentKind.NOISE, media[-1])]


def _gaps(
    text: TextFacts, task: Task, dropout: Dropout, blocks: int, conditions: int
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(tokens of each gap, span in the gap that has one) with what is dropped left out.

    Behind a condition's block the caption stands alone between special tokens, so dropping it takes away its tokens
    and nothing else; without a block it is tokenised together with the template before it.
    """
    if not task.is_generation:
        return text.gaps, text.span
    if blocks == 1:
        before, span = (text.empty, (0, 0)) if dropout.caption else (text.bare, text.bare_span)
        return (before, text.gaps[-1]), span
    before, span = text.gaps[-2], text.span
    if dropout.caption:
        before, span = before - (span[1] - span[0]), (0, 0)
    return (text.gaps[0], *[0] * (blocks - 2), before, text.gaps[-1]), span


@lru_cache(maxsize=1 << 15)
def _shape(info: MediaInfo, kind: SegmentKind, task: Task, frame_conditions: str, sizing: Sizing) -> _Shape:
    """A block of a picture or clip.

    Raises:
        ValueError: if it has too few frames, or a latent lies outside the position table.
    """
    frames: tuple[int, ...] = (0,)
    if info.kind == "video":
        seconds = sizing.max_seconds_generation if task.is_generation else sizing.max_seconds_understanding
        frames = sample_frames(info.n_frames, info.average_fps, sizing.target_fps, seconds, sizing.frame_sampling)
    if kind is SegmentKind.VIT:
        of_picture = info.width, info.height, sizing.vit_resolution
        size = vit_size(*of_picture, sizing.vit_sides)
        segment = Segment.visual(kind, vit_grid(len(frames), size))
        return _Shape(segment, frames, bucket_size(*of_picture, VIT_PATCH, sizing.vit_sides), size)
    of_picture = info.width, info.height, sizing.vae_resolution
    size = vae_size(*of_picture, sizing.vae_sides)
    grid = vae_grid(len(frames), size)
    clean: tuple[int, ...] = ()
    if task is Task.I2V:
        clean = (0,) if frame_conditions == "first" else (0, grid[0] - 1)
        if grid[0] <= len(clean):
            raise ValueError(
                f"{len(frames)} frames give {grid[0]} latent frames, none is left beside the frame conditions "
                f"'{frame_conditions}'; use a longer clip"
            )
    _check_grid(grid, sizing)
    bucket = bucket_size(*of_picture, VAE_STRIDE, sizing.vae_sides)
    return _Shape(Segment.visual(kind, grid, clean), frames, bucket, size)


def _check_grid(grid: tuple[int, int, int], sizing: Sizing) -> None:
    """Raise ValueError where a latent lies outside the position table."""
    side = sizing.position_size
    if not has_positions(grid, sizing.position_frames, side):
        raise ValueError(
            f"latent grid {grid} exceeds the position table of {sizing.position_frames} x {side} x {side}; lower "
            "data.vae_resolution or data.max_seconds_generation, or raise model.latent_position_size or "
            "model.latent_position_frames"
        )
