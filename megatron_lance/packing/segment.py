"""Segments: the contiguous pieces a sample is made of (spec/model.md section 2).

Station: record -> task -> [sample (segments)] -> packer.  In: lengths and grids.  Out: values that the
layout, the attention plan and the positions are computed from.  Nothing here knows a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class SegmentKind(StrEnum):
    """What a segment holds, and with it its attention rule."""

    TEXT = "text"
    """Text tokens; causal."""
    VIT = "vit"
    """ViT features of an image or clip between two markers; full attention inside."""
    CLEAN = "clean"
    """Clean VAE latents (a condition) between two markers; full attention inside."""
    NOISE = "noise"
    """Noisy VAE latents (a target) between two markers; full inside, invisible from outside."""


class Expert(StrEnum):
    """The two stacks a token can be processed by."""

    UND = "und"
    """Understanding: text, ViT content and the markers of every block."""
    GEN = "gen"
    """Generation: VAE content, clean and noisy."""


VAE_KINDS = (SegmentKind.CLEAN, SegmentKind.NOISE)


@dataclass(frozen=True)
class Segment:
    """One contiguous run of tokens with one kind.

    Attributes:
        kind: what the segment holds.
        length: tokens, the two vision markers of a visual segment included.
        grid: (T, H, W) cells of the content of a visual segment, for a ViT block after the 2x2 merge; None for
            text.
        clean_frames: latent frames of a noise segment that stay clean at t = 0 and carry no loss (I2V frame
            conditions); indices in [0, T).

    Raises:
        ValueError: if length, grid and kind contradict one another.
    """

    kind: SegmentKind
    length: int
    grid: tuple[int, int, int] | None = None
    clean_frames: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind is SegmentKind.TEXT:
            if self.grid is not None:
                raise ValueError(f"segment grid {self.grid}: a text segment has no grid; leave it None")
            if self.length < 1:
                raise ValueError(f"segment length {self.length}: a text segment needs at least one token")
        else:
            if self.grid is None or min(self.grid) < 1:
                raise ValueError(f"segment grid {self.grid}: a {self.kind} segment needs a positive (T, H, W)")
            if self.length != self.content_length + 2:
                raise ValueError(
                    f"segment length {self.length}: a {self.kind} segment of grid {self.grid} has "
                    f"{self.content_length} content tokens and 2 markers; use Segment.visual"
                )
        if self.clean_frames:
            if self.kind is not SegmentKind.NOISE or self.grid is None:
                raise ValueError(f"segment clean_frames {self.clean_frames}: only a noise segment has frame conditions")
            outside = [f for f in self.clean_frames if not 0 <= f < self.grid[0]]
            if outside or len(set(self.clean_frames)) != len(self.clean_frames):
                raise ValueError(
                    f"segment clean_frames {self.clean_frames}: must be distinct and inside the {self.grid[0]} "
                    "latent frames of the grid"
                )

    @classmethod
    def text(cls, length: int) -> Segment:
        """A text segment of `length` tokens."""
        return cls(SegmentKind.TEXT, length)

    @classmethod
    def visual(cls, kind: SegmentKind, grid: tuple[int, int, int], clean_frames: tuple[int, ...] = ()) -> Segment:
        """A visual segment of `grid` (T, H, W) cells with its two markers."""
        t, h, w = grid
        return cls(kind, t * h * w + 2, (t, h, w), clean_frames)

    @property
    def is_visual(self) -> bool:
        """Whether the segment has markers and a grid."""
        return self.kind is not SegmentKind.TEXT

    @property
    def content_length(self) -> int:
        """Tokens without the two markers; 0 for text."""
        if self.grid is None:
            return 0
        t, h, w = self.grid
        return t * h * w

    @property
    def gen_length(self) -> int:
        """Tokens the generation expert processes."""
        return self.content_length if self.kind in VAE_KINDS else 0

    @property
    def velocity_rows(self) -> int:
        """Rows with a velocity loss: noisy content that is not a frame condition (spec/model.md section 5)."""
        if self.kind is not SegmentKind.NOISE or self.grid is None:
            return 0
        t, h, w = self.grid
        return (t - len(self.clean_frames)) * h * w
