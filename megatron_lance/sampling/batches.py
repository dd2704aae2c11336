"""Lines of a prompt list through the engine, some at a time; what the command line and training's previews share.

Station: prompt list -> [batches -> prompts of each turn -> engine] -> files, TensorBoard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lance.packing.positions import Mape
from megatron_lance.sampling.engine import Engine
from megatron_lance.sampling.flow_sampler import SamplerSettings
from megatron_lance.sampling.media import Frames
from megatron_lance.sampling.prompt_list import Line
from megatron_lance.sampling.text_decoder import DecoderSettings

Item = tuple[Line, int]
"""A line and the number of its copy, from 0."""


@dataclass(frozen=True)
class HowToSample:
    """Settings of both samplers.

    Attributes:
        flow: of pictures and clips.
        text: of answers.
        understanding_mape: positions of questions (spec/model.md section 7).
    """

    flow: SamplerSettings
    text: DecoderSettings
    understanding_mape: Mape


def batches(work: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Neighbours of one kind (generation or understanding), at most `size` together."""
    batch: list[Item] = []
    for item in work:
        if batch and (len(batch) == size or batch[0][0].task.is_generation != item[0].task.is_generation):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def sample_batch(engine: Engine, batch: Sequence[Item], how: HowToSample) -> list[Frames | str]:
    """Sample a batch of one kind; a collective of the replica.

    Args:
        engine: of this rank.
        batch: from `batches`.
        how: the settings.

    Returns:
        frames or the answer of every item.

    Raises:
        PromptError: naming the line that cannot be sampled.
    """
    if batch[0][0].task.is_generation:
        return [*_generate(engine, batch, how.flow)]
    prompts = [line.prompt(0, line.read_media()) for line, _ in batch]
    return [*engine.answer(prompts, how.text, how.understanding_mape)]


def _generate(engine: Engine, batch: Sequence[Item], settings: SamplerSettings) -> list[Frames]:
    """The last turn's frames of every item; a turn's result is the source of the next."""
    media = [line.read_media() for line, _ in batch]
    frames: list[Frames] = [np.zeros((0, 0, 0, 3), np.uint8)] * len(batch)
    for turn in range(max(len(line.texts) for line, _ in batch)):
        going = [i for i, (line, _) in enumerate(batch) if turn < len(line.texts)]
        prompts = [batch[i][0].prompt(turn, media[i]) for i in going]
        seeds = [batch[i][0].seed + batch[i][1] for i in going]
        for i, made in zip(going, engine.generate(prompts, seeds, settings), strict=True):
            frames[i], media[i] = made, (engine.as_medium(made),)
    return frames
