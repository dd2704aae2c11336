"""Lines of a prompt list through the engine, some at a time; what the command line and training's previews share.

Station: prompt list -> [batches -> rounds -> prompts of each turn -> engine] -> files, TensorBoard.  A round is a batch
for every replica.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from megatron_lance.packing.positions import Mape
from megatron_lance.sampling.engine import Engine
from megatron_lance.sampling.flow_sampler import SamplerSettings
from megatron_lance.sampling.media import Frames
from megatron_lance.sampling.prompt_list import Line
from megatron_lance.sampling.text_decoder import DecoderSettings

Item = tuple[Line, int]
"""A line and the number of its copy, from 0."""
Sampled = Frames | str
"""A picture or clip, or an answer."""


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


def rounds(work: Sequence[Item], size: int, replicas: int) -> list[list[list[Item]]]:
    """Batches of up to `size`, one for each replica at a time; the last round may have fewer."""
    found = list(batches(work, size))
    return [found[first : first + replicas] for first in range(0, len(found), replicas)]


def sample_round(engine: Engine, of_replicas: Sequence[Sequence[Item]], how: HowToSample) -> list[tuple[Item, Sampled]]:
    """Sample a round; a collective of the world.

    Args:
        engine: of this rank.
        of_replicas: from `rounds`.
        how: the settings.

    Returns:
        every item with its frames or answer, in their order, on the first rank; nothing on the others.

    Raises:
        PromptError: naming the line that cannot be sampled.
    """
    groups = engine.passes.groups
    own = [pair for batch in of_replicas[groups.dp_rank :][:1] for pair in _sample_batch(engine, batch, how)]
    gathered = [own] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own if groups.replica.rank() == 0 else [], gathered)
    return [pair for part in gathered or () for pair in part]


def _sample_batch(engine: Engine, batch: Sequence[Item], how: HowToSample) -> list[tuple[Item, Sampled]]:
    """Every item of a batch with its result; a collective of the replica."""
    results: Sequence[Sampled]
    if batch[0][0].task.is_generation:
        results = _generate(engine, batch, how.flow)
    else:
        prompts = [line.prompt(0, line.read_media()) for line, _ in batch]
        results = engine.answer(prompts, _seeds(batch), how.text, how.understanding_mape)
    return list(zip(batch, results, strict=True))


def _seeds(batch: Sequence[Item]) -> list[int]:
    """A copy's seed is as many more than its line's as its number."""
    return [line.seed + copy for line, copy in batch]


def _generate(engine: Engine, batch: Sequence[Item], settings: SamplerSettings) -> list[Frames]:
    """The last turn's frames of every item; a turn's result is the source of the next."""
    media = [line.read_media() for line, _ in batch]
    frames: list[Frames] = [np.zeros((0, 0, 0, 3), np.uint8)] * len(batch)
    for turn in range(max(len(line.texts) for line, _ in batch)):
        going = [i for i, (line, _) in enumerate(batch) if turn < len(line.texts)]
        prompts = [batch[i][0].prompt(turn, media[i]) for i in going]
        seeds = _seeds([batch[i] for i in going])
        for i, made in zip(going, engine.generate(prompts, seeds, settings), strict=True):
            frames[i], media[i] = made, (engine.as_medium(made),)
    return frames
