"""From a caption to a sampling request (spec/data.md section 2).

Station: prompt list -> [request] -> sampler.
"""

from __future__ import annotations

import torch

from megatron_lance.config.schema import PromptConfig
from megatron_lance.data.prompt import Role, Text, Tokenizer, Visual, chat
from megatron_lance.packing.sample import Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.sampling.flow_sampler import Request


def text_to_visual(
    name: str, caption: str, grid: tuple[int, int, int], tokenizer: Tokenizer, prompts: PromptConfig, channels: int
) -> Request:
    """A T2I or T2V request.

    Args:
        name: sample id; addresses the initial noise.
        caption: what to draw.
        grid: latent (T, H, W); T = 1 is a picture.
        tokenizer: of the model.
        prompts: system prompts.
        channels: latent channels.
    """
    is_picture = grid[0] == 1
    system = prompts.generation_image_inference if is_picture else prompts.generation.replace("{v}", "video")
    block = Segment.visual(SegmentKind.NOISE, grid)
    encoded = tokenizer.encode(chat(system, [Text(caption, Role.CAPTION)], [Visual(block.content_length)]))
    start, stop = encoded.visual_spans[0]
    segments = [Segment.text(start), block]
    if stop < len(encoded.token_ids):
        segments.append(Segment.text(len(encoded.token_ids) - stop))
    sample = Sample(name, Task.T2I if is_picture else Task.T2V, tuple(segments), (), encoded.caption_span)
    return Request(sample, torch.tensor(encoded.token_ids), torch.zeros(block.content_length, channels))
