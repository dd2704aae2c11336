"""Tasks: what a record of each task becomes.

Station: record -> [task] -> sample -> packer.  In: a record.  Out: its prompt with a block for every picture or clip,
and, once the grids of the blocks are known (sample_plan.py), the sample's structure and its token ids (spec/data.md
sections 1 and 2, spec/model.md sections 2 and 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lance.config.schema import DataConfig, PromptConfig
from megatron_lance.data.prompt import Piece, Role, Text, Tokenizer, Visual, chat
from megatron_lance.data.records import Media, Record, RecordError
from megatron_lance.packing.rng import uniform
from megatron_lance.packing.sample import Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind


@dataclass(frozen=True)
class MediaItem:
    """What one visual segment needs decoded.

    Attributes:
        sample_index: sample of the pack; 0 until the sample lies in one.
        segment_index: segment of that sample.
        source, file, row, element: where the bytes are; see `records`.
        frames: frame numbers to decode, in order.
        bucket: (H, W) of the resize bucket, pixels.
        size: (H, W) of the final crop, pixels.
        encoder: "vit" or "vae".
    """

    sample_index: int
    segment_index: int
    source: str
    file: str
    row: int
    element: str
    frames: tuple[int, ...]
    bucket: tuple[int, int]
    size: tuple[int, int]
    encoder: str


@dataclass(frozen=True)
class Dropout:
    """Condition dropout of one sample in one epoch.

    Attributes:
        caption: whether the caption is left empty.
        conditions: numbers of the condition media left out, ViT and VAE block together.
    """

    caption: bool = False
    conditions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """A visual block of a prompt before its grid is known."""

    kind: SegmentKind
    media: Media


Outline = list[Piece | Block]


def draw_dropout(config: DataConfig, conditions: int, sample_id: str, task: Task, seed: int, epoch: int) -> Dropout:
    """Condition dropout by addressed randomness (spec/model.md section 8); understanding drops nothing.

    The release drops the caption and, independently, each condition.  The paper drops everything (caption and all
    conditions) or the caption alone.  First and last frames of I2V lie in the target's segment and always stay.

    Args:
        config: scheme and probabilities.
        conditions: media before the target.
        sample_id: the address.
        task: of the sample.
        seed: the run's seed.
        epoch: pass over the record's source.
    """
    if not task.is_generation:
        return Dropout()
    address = (sample_id, epoch)
    if config.dropout_scheme == "paper":
        drawn = uniform(seed, "dropout", *address)
        if drawn < config.condition_dropout:
            return Dropout(True, tuple(range(conditions)))
        return Dropout(drawn < config.condition_dropout + config.caption_dropout)
    dropped = [
        k for k in range(conditions) if uniform(seed, "condition_dropout", *address, k) < config.condition_dropout
    ]
    return Dropout(uniform(seed, "caption_dropout", *address) < config.caption_dropout, tuple(dropped))


def outline(record: Record, task: Task, prompts: PromptConfig, dropout: Dropout) -> Outline:
    """The prompt of a record, its visual blocks still without grids (spec/data.md section 2).

    Args:
        record: of any schema.
        task: what it trains.
        prompts: system prompts.
        dropout: what is left out.

    Raises:
        RecordError: if the record's parts are not those of the task.
    """
    if task.is_generation:
        return _generation_outline(record, task, prompts, dropout)
    media = [element for element in record.inputs if isinstance(element, Media)]
    texts = [element for element in record.inputs if isinstance(element, str) and element]
    if not isinstance(record.target, str) or not record.target:
        raise RecordError(f"{record.sample_id}: task {task} needs an answer that is text and not empty")
    if bool(media) == (task is Task.T2T):
        takes = "none" if task is Task.T2T else "at least 1"
        raise RecordError(f"{record.sample_id}: has {len(media)} media; task {task} takes {takes}")
    if not media and not texts:
        raise RecordError(f"{record.sample_id}: task {task} needs a question")
    system = record.system
    if not system and media:
        kind = "video" if any(m.kind == "video" for m in media) else "image"
        system = (prompts.understanding if texts else prompts.captioning).replace("{v}", kind)
    user: Outline = [
        Block(SegmentKind.VIT, element) if isinstance(element, Media) else Text(element) for element in record.inputs
    ]
    return _chat(system, user, [Text(record.target, Role.ANSWER)])


def _generation_outline(record: Record, task: Task, prompts: PromptConfig, dropout: Dropout) -> Outline:
    """Each condition's ViT block then its clean block, the caption, the noisy target."""
    conditions = [element for element in record.inputs if isinstance(element, Media)]
    caption = " ".join(element for element in record.inputs if isinstance(element, str) and element)
    target, kind = record.target, task.makes
    if not isinstance(target, Media) or target.kind != kind:
        found = target.kind if isinstance(target, Media) else "text"
        raise RecordError(f"{record.sample_id}: the target is {found}; task {task} needs {kind}")
    if not caption:
        raise RecordError(f"{record.sample_id}: the caption is empty; task {task} needs one")
    takes_conditions = task.is_edit or task.is_subject_driven
    if bool(conditions) != takes_conditions:
        raise RecordError(
            f"{record.sample_id}: has {len(conditions)} condition media; task {task} takes "
            f"{'at least 1' if takes_conditions else 'none'}"
        )
    user: Outline = []
    for k, media in enumerate(conditions):
        if k not in dropout.conditions:
            user += [Block(SegmentKind.VIT, media), Block(SegmentKind.CLEAN, media)]
    if not dropout.caption:
        user.append(Text(caption, Role.CAPTION))
    prompt = prompts.subject if task.is_subject_driven else prompts.editing if task.is_edit else prompts.generation
    return _chat(prompt.replace("{v}", kind), user, [Block(SegmentKind.NOISE, target)])


def _chat(system: str, user: Outline, output: Outline) -> Outline:
    """`prompt.chat` around pieces that may be blocks."""
    blocks = [piece for piece in [*user, *output] if isinstance(piece, Block)]
    slots = iter(blocks)
    empty = [[Visual(0) if isinstance(piece, Block) else piece for piece in part] for part in (user, output)]
    return [next(slots) if isinstance(piece, Visual) else piece for piece in chat(system, *empty)]


def assemble(
    sample_id: str, task: Task, pieces: Outline, visuals: Sequence[Segment], tokenizer: Tokenizer
) -> tuple[Sample, tuple[int, ...]]:
    """Tokenise an outline whose visual segments are known.

    Args:
        sample_id: name of the sample.
        task: of the sample.
        pieces: from `outline`.
        visuals: one segment per block, in order.
        tokenizer: of the run.

    Returns:
        (sample, its token ids). Text between two visual blocks is one segment.

    Raises:
        ValueError: if blocks and visual segments do not match.
    """
    kinds = [piece.kind for piece in pieces if isinstance(piece, Block)]
    if kinds != [segment.kind for segment in visuals]:
        raise ValueError(
            f"{sample_id}: visual segments {[str(s.kind) for s in visuals]} do not match its blocks "
            f"{[str(k) for k in kinds]}"
        )
    slots = iter(visuals)
    encoded = tokenizer.encode(
        Visual(next(slots).content_length) if isinstance(piece, Block) else piece for piece in pieces
    )
    segments: list[Segment] = []
    at = 0
    for (start, stop), visual in zip(encoded.visual_spans, visuals, strict=True):
        if start > at:
            segments.append(Segment.text(start - at))
        segments.append(visual)
        at = stop
    if len(encoded.token_ids) > at:
        segments.append(Segment.text(len(encoded.token_ids) - at))
    sample = Sample(sample_id, task, tuple(segments), encoded.label_spans, encoded.caption_span)
    return sample, encoded.token_ids
