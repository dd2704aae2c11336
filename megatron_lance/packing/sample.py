"""Samples and packs: which segments stand beside one another (spec/model.md sections 2 and 6).

Station: record -> task -> [sample] -> packer -> [pack].  A pack is planned from metadata alone; token ids, pixels
and latents are read later and follow the order fixed here, called pack order: samples one after another, each
sample's segments one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from megatron_lance.packing.segment import Segment, SegmentKind


class Task(StrEnum):
    """The training tasks (spec/data.md section 1)."""

    T2I = "t2i"
    T2V = "t2v"
    I2V = "i2v"
    I_EDIT = "i_edit"
    V_EDIT = "v_edit"
    S2I = "s2i"
    S2V = "s2v"
    I2T = "i2t"
    V2T = "v2t"
    T2T = "t2t"

    @property
    def is_subject_driven(self) -> bool:
        """Whether clean VAE segments are references, anchored apart by MaPE."""
        return self in (Task.S2I, Task.S2V)

    @property
    def is_edit(self) -> bool:
        """Whether clean VAE segments are the source of the target."""
        return self in (Task.I_EDIT, Task.V_EDIT)

    @property
    def is_generation(self) -> bool:
        """Whether the sample has a noisy target (and no CE loss)."""
        return self not in (Task.I2T, Task.V2T, Task.T2T)

    @property
    def makes(self) -> str:
        """Kind of the target: image | video | text."""
        if not self.is_generation:
            return "text"
        return "image" if self in (Task.T2I, Task.I_EDIT, Task.S2I) else "video"


@dataclass(frozen=True)
class Sample:
    """One training example as structure.

    Attributes:
        sample_id: stable name, unique in the data set; randomness is addressed by it.
        task: what is trained.
        segments: in order.
        label_spans: [start, stop) token ranges of the sample that are CE labels; the row that predicts label i
            is i - 1.
        caption_span: [start, stop) token range dropped for the unconditional branch, None if there is none.

    Raises:
        ValueError: if a span lies outside the sample or a label would have no predicting row.
    """

    sample_id: str
    task: Task
    segments: tuple[Segment, ...]
    label_spans: tuple[tuple[int, int], ...] = ()
    caption_span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError(f"sample {self.sample_id}: has no segment")
        for start, stop in self.label_spans:
            if not 1 <= start < stop <= self.length:
                raise ValueError(
                    f"sample {self.sample_id}: label span [{start}, {stop}) must lie in [1, {self.length}] "
                    "and not be empty"
                )
        at = 0
        for segment in self.segments:
            first, last = at + 1, at + segment.length - 1
            if segment.gen_length and any(start <= last and first < stop - 1 for start, stop in self.label_spans):
                raise ValueError(
                    f"sample {self.sample_id}: a label in {self.label_spans} would be predicted by VAE content "
                    f"[{first}, {last}); only text and ViT rows reach the LM head"
                )
            at += segment.length
        if self.caption_span is not None:
            start, stop = self.caption_span
            if not 0 <= start <= stop <= self.length:
                raise ValueError(
                    f"sample {self.sample_id}: caption span [{start}, {stop}) lies outside [0, {self.length}]"
                )

    @property
    def length(self) -> int:
        """Tokens."""
        return sum(s.length for s in self.segments)

    @property
    def gen_length(self) -> int:
        """Tokens of the generation expert."""
        return sum(s.gen_length for s in self.segments)

    @property
    def ce_rows(self) -> int:
        """Rows with a CE loss."""
        return sum(stop - start for start, stop in self.label_spans)

    @property
    def velocity_rows(self) -> int:
        """Rows with a velocity loss."""
        return sum(s.velocity_rows for s in self.segments)


@dataclass(frozen=True)
class PlacedSegment:
    """A segment at its place in a pack.

    Attributes:
        sample_index: which sample of the pack.
        segment_index: which segment of that sample.
        start: pack-order index of its first token (the start marker of a visual segment).
        segment: the segment.
    """

    sample_index: int
    segment_index: int
    start: int
    segment: Segment

    @property
    def stop(self) -> int:
        """Pack-order index behind its last token."""
        return self.start + self.segment.length

    @property
    def content(self) -> tuple[int, int]:
        """Pack-order [start, stop) of the content of a visual segment, without markers."""
        return self.start + 1, self.stop - 1


@dataclass(frozen=True)
class Pack:
    """One packed sequence: samples one after another.

    Attributes:
        samples: in pack order.
        capacity: token budget of the pack; constant for a run.

    Raises:
        ValueError: if the samples do not fit.
    """

    samples: tuple[Sample, ...]
    capacity: int

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("pack: has no sample")
        if self.length > self.capacity:
            raise ValueError(
                f"pack of {self.length} tokens: exceeds its capacity {self.capacity}; raise data.seq_length or "
                "drop samples"
            )

    @property
    def length(self) -> int:
        """Real tokens."""
        return sum(s.length for s in self.samples)

    @property
    def gen_length(self) -> int:
        """Tokens of the generation expert."""
        return sum(s.gen_length for s in self.samples)

    @property
    def ce_rows(self) -> int:
        """Rows with a CE loss."""
        return sum(s.ce_rows for s in self.samples)

    @property
    def velocity_rows(self) -> int:
        """Rows with a velocity loss."""
        return sum(s.velocity_rows for s in self.samples)

    @property
    def sample_starts(self) -> tuple[int, ...]:
        """Pack-order index of each sample's first token."""
        starts, at = [], 0
        for sample in self.samples:
            starts.append(at)
            at += sample.length
        return tuple(starts)

    def placed_segments(self) -> Iterator[PlacedSegment]:
        """All segments with their pack-order places."""
        at = 0
        for i, sample in enumerate(self.samples):
            for j, segment in enumerate(sample.segments):
                yield PlacedSegment(i, j, at, segment)
                at += segment.length

    def visual_segments(self, *kinds: SegmentKind) -> Iterator[PlacedSegment]:
        """The placed segments of the given kinds, in pack order; encodings follow this order."""
        return (p for p in self.placed_segments() if p.segment.kind in kinds)
