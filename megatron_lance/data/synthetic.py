"""Synthetic samples of a training stage: structures as its data would give, without data.

Station: stage -> [samples, packs] -> benchmarks and profiling.  Mixtures, sizes and budgets are those of
spec/recipes.md and spec/data.md; clips last 1 to 6 seconds (log-normal), captions are log-normal too.  Everything is
drawn from addressed streams, so a stage and a seed always give the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megatron_lance.config.errors import UserError
from megatron_lance.data.sizes import ASPECT_RATIOS, bucket_size, sample_frames, vae_grid, vae_size, vit_grid, vit_size
from megatron_lance.packing.packer import pack_lengths
from megatron_lance.packing.rng import stream
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind

MARKUP = 30
"""Tokens of the chat template and a system prompt."""
CLIP_FPS = 24
UNDERSTANDING_SECONDS, TARGET_FPS = 2.0, 12.0


@dataclass(frozen=True)
class Stage:
    """What of a recipe shapes its packs.

    Attributes:
        capacity: most tokens of a pack.
        min_tokens: fewest tokens of a pack the recipe wants.
        max_sample: most tokens of a sample.
        resolutions: (VAE, ViT) bucket resolutions, pixels.
        generation_sides: (least short side, greatest long side) of a generated bucket, pixels.
        image: T2I : I-Edit : S2I.
        video: T2V : I2V : V-Edit : S2V.
    """

    capacity: int
    min_tokens: int
    max_sample: int
    resolutions: tuple[tuple[int, int], ...]
    generation_sides: tuple[int, int]
    image: tuple[float, float, float]
    video: tuple[float, float, float, float]

    def shares(self) -> dict[Task, float]:
        """Share of samples by task: video generation : understanding : image generation : understanding 64:16:16:4."""
        video = dict(zip((Task.T2V, Task.I2V, Task.V_EDIT, Task.S2V), self.video, strict=True))
        image = dict(zip((Task.T2I, Task.I_EDIT, Task.S2I), self.image, strict=True))
        parts = {task: 0.64 * part / sum(video.values()) for task, part in video.items()}
        parts |= {task: 0.16 * part / sum(image.values()) for task, part in image.items()}
        return {task: part for task, part in (parts | {Task.V2T: 0.16, Task.I2T: 0.04}).items() if part}


_192P, _360P, _480P = (256, 224), (480, 476), (640, 616)
_CONTINUED = {
    "capacity": 80_000,
    "min_tokens": 74_000,
    "max_sample": 68_000,
    "resolutions": (_480P,),
    "generation_sides": (480, 848),
}
STAGES: dict[str, Stage] = {
    "pt": Stage(50_000, 44_000, 40_000, (_192P, _360P, _480P), (192, 848), (100, 0, 0), (100, 0, 0, 0)),
    "ct1": Stage(**_CONTINUED, image=(70, 15, 15), video=(60, 10, 15, 15)),  # type: ignore[arg-type]
    "ct2": Stage(**_CONTINUED, image=(60, 20, 20), video=(40, 20, 20, 20)),  # type: ignore[arg-type]
    "ct3": Stage(**_CONTINUED, image=(50, 25, 25), video=(25, 25, 25, 25)),  # type: ignore[arg-type]
    "sft": Stage(**_CONTINUED, image=(60, 20, 20), video=(60, 10, 15, 15)),  # type: ignore[arg-type]
}


def _log_normal(rng: np.random.Generator, median: float, sigma: float, low: float, high: float) -> float:
    """A log-normal value; drawn again while it lies outside [low, high]."""
    while True:
        value = median * math.exp(sigma * rng.standard_normal())
        if low <= value <= high:
            return value


@dataclass(frozen=True)
class _Media:
    """A picture (one frame) or clip of given nominal size, as both encoders would see it."""

    width: int
    height: int
    frames: int
    resolutions: tuple[int, int]

    def clean(self, frames: int | None = None) -> Segment:
        return self._vae(SegmentKind.CLEAN, (), frames)

    def _vae(self, kind: SegmentKind, conditions: tuple[int, ...], frames: int | None = None) -> Segment:
        size = vae_size(self.width, self.height, self.resolutions[0])
        return Segment.visual(kind, vae_grid(frames or self.frames, size), conditions)

    def vit(self, frames: int | None = None) -> Segment:
        size = vit_size(self.width, self.height, self.resolutions[1])
        return Segment.visual(SegmentKind.VIT, vit_grid(frames or self.frames, size))

    def noise(self, conditions: tuple[int, ...] = ()) -> Segment:
        return self._vae(SegmentKind.NOISE, conditions)


def _media(rng: np.random.Generator, stage: Stage, video: bool) -> _Media:
    """A picture or a clip whose bucket the stage allows."""
    short, long = stage.generation_sides
    while True:
        resolutions = stage.resolutions[rng.integers(len(stage.resolutions))]
        width, height = ASPECT_RATIOS[rng.integers(len(ASPECT_RATIOS))]
        width, height = 100 * width, 100 * height
        bucket = bucket_size(width, height, resolutions[0])
        if short <= min(bucket) and max(bucket) <= long:
            break
    seconds = _log_normal(rng, 3.0, 0.5, 1.0, 6.0) if video else 0.0
    frames = len(sample_frames(round(seconds * CLIP_FPS), CLIP_FPS, TARGET_FPS, 6.0)) if video else 1
    return _Media(width, height, frames, resolutions)


def _segments(rng: np.random.Generator, task: Task, stage: Stage) -> tuple[tuple[Segment, ...], int]:
    """(segments, answer tokens) of one sample."""
    media = _media(rng, stage, task in (Task.T2V, Task.I2V, Task.V_EDIT, Task.S2V, Task.V2T))
    caption = Segment.text(int(_log_normal(rng, 120, 0.6, 8, 600)))
    start, end = Segment.text(MARKUP), Segment.text(1)
    if not task.is_generation:
        few = len(sample_frames(media.frames * 2, CLIP_FPS, TARGET_FPS, UNDERSTANDING_SECONDS))
        answer = int(_log_normal(rng, 60, 0.8, 2, 500))
        return (start, media.vit(1 if task is Task.I2T else few), Segment.text(caption.length + answer)), answer
    conditions: tuple[Segment, ...] = ()
    if task.is_edit:
        conditions = (media.vit(), media.clean())
    elif task.is_subject_driven:
        conditions = tuple(s for _ in range(rng.integers(1, 4)) for s in (media.vit(1), media.clean(1)))
    target = media.noise((0,) if task is Task.I2V else ())
    return (start, *conditions, caption, target, end), 0


def stage_samples(stage: str, seed: int) -> Iterator[Sample]:
    """Endless samples of a stage, in the order of its mixture: the next is of the task furthest behind its share.

    Args:
        stage: a key of STAGES.
        seed: of all draws.
    """
    settings = STAGES[stage]
    shares = settings.shares()
    tasks, share = list(shares), np.array(list(shares.values()))
    drawn = np.zeros(len(tasks))
    number = 0
    while True:
        chosen = int(np.argmax(share * (number + 1) - drawn))
        drawn[chosen] += 1
        rng = stream(seed, "synthetic", stage, number)
        while True:
            segments, answer = _segments(rng, tasks[chosen], settings)
            length = sum(s.length for s in segments)
            if length <= settings.max_sample:
                break
        labels = ((length - answer, length),) if answer else ()
        yield Sample(f"{stage}/{number}", tasks[chosen], segments, labels)
        number += 1


def stage_packs(stage: str, count: int, seed: int = 0) -> list[Pack]:
    """The first packs that the packer closes over the samples of a stage.

    Args:
        stage: a key of STAGES.
        count: packs.
        seed: of all draws.
    """
    capacity, number = STAGES[stage].capacity, 8 * count
    while True:
        samples = list(islice(stage_samples(stage, seed), number))
        groups = pack_lengths([s.length for s in samples], capacity)
        if len(groups) > count + 16:  # those still open at the end are not full
            return [Pack(tuple(samples[i] for i in group), capacity) for group in groups[:count]]
        number *= 2


def scaled(sample: Sample, factor: float) -> Sample:
    """A sample of the same kind with about `factor` times the tokens, for models and machines that are small.

    Texts become shorter and grids smaller along height and width; frames stay.

    Args:
        sample: of a stage.
        factor: at most 1.
    """
    side = math.sqrt(factor)
    answer = sum(stop - start for start, stop in sample.label_spans)
    answer = max(1, round(answer * factor)) if answer else 0
    segments = []
    for segment in sample.segments:
        if segment.grid is None:
            segments.append(Segment.text(max(2, round(segment.length * factor))))
        else:
            t, h, w = segment.grid
            grid = (t, max(1, round(h * side)), max(1, round(w * side)))
            segments.append(Segment.visual(segment.kind, grid, segment.clean_frames))
    if answer:
        segments[-1] = Segment.text(max(segments[-1].length, answer + 1))
    length = sum(segment.length for segment in segments)
    labels = ((length - answer, length),) if answer else ()
    return Sample(sample.sample_id, sample.task, tuple(segments), labels)


def scaled_packs(stage: str, count: int, capacity: int, seed: int = 0) -> list[Pack]:
    """Packs of a stage's mixture in a budget of tokens other than the recipe's: all samples shrink alike.

    Args:
        stage: a key of STAGES.
        count: packs.
        capacity: tokens of a pack; the recipe's own leaves samples as they are.
        seed: of all draws.

    Raises:
        UserError: if no sample shrinks that far.
    """
    factor = capacity / STAGES[stage].capacity
    if factor >= 1:
        return [Pack(pack.samples, capacity) for pack in stage_packs(stage, count, seed)]
    number = 16 * count
    while True:
        drawn = (scaled(sample, factor) for sample in islice(stage_samples(stage, seed), number))
        samples = [sample for sample in drawn if sample.length <= capacity]
        if not samples:
            raise UserError(f"data.seq_length = {capacity}: no sample of stage {stage} is that short; raise it")
        groups = pack_lengths([s.length for s in samples], capacity)
        if len(groups) > count + 16:  # those still open at the end are not full
            return [Pack(tuple(samples[i] for i in group), capacity) for group in groups[:count]]
        number *= 2
