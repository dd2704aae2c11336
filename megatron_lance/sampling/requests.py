"""From a prompt with its media to what the samplers take (spec/data.md section 2).

Station: prompt list -> [outline -> decode, encode -> request or question] -> samplers.  The prompt is built by the code
that builds training samples; only the target is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import DataConfig
from megatron_lance.data.decode import DecodeRequest, MediaDecoder
from megatron_lance.data.media import MediaError, MediaInfo, probe
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.records import Media, Record, RecordError
from megatron_lance.data.sizes import bucket_size, sample_frames, vae_grid, vae_size, vit_grid, vit_size
from megatron_lance.data.tasks import Block, Dropout, assemble, outline
from megatron_lance.encoders.vae import VideoAutoencoder
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.packing.sample import Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.sampling.flow_sampler import Request
from megatron_lance.sampling.text_decoder import Question

TARGET = "target"
"""Element name of what is to be generated."""
STILL_FRAMES = 5
"""Frames of a clip that stands still, with more than one latent frame."""


@dataclass(frozen=True)
class Prompt:
    """One thing to sample.

    Attributes:
        name: addresses the noise.
        task: what is sampled.
        text: caption, instruction or question.
        media: files of the conditions, in order: sources and references, or for I2V the first and maybe the last frame.
        size: (H, W) of the target, pixels, multiples of 16; an edit takes its source's if None.
        frames: of the target clip, 4k+1; an edit takes its source's if None.
        where: the list and line it is from, for errors; the name if empty.
    """

    name: str
    task: Task
    text: str
    media: tuple[bytes, ...] = ()
    size: tuple[int, int] | None = None
    frames: int | None = None
    where: str = ""


class PromptError(UserError):
    """A prompt that cannot be sampled; the message names it and the rule."""


@dataclass(frozen=True)
class _Plan:
    """A visual segment and how to get its content: a decode request, or nothing for the target."""

    segment: Segment
    decode: DecodeRequest | None


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt as tokens, its media not decoded yet.

    Attributes:
        prompt: what is planned.
        sample: the structure; of a question with one token for the answer.
        token_ids: of it.
        visuals: its visual segments.
    """

    prompt: Prompt
    sample: Sample
    token_ids: tuple[int, ...]
    visuals: tuple[_Plan, ...]


class PromptPlanner:
    """Plans prompts; needs neither weights nor a decoder, so whole lists can be looked through before.

    Args:
        data: prompts, resolutions, frame sampling.
        tokenizer: of the model.
    """

    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        self.data, self.tokenizer = data, tokenizer

    def plan(self, prompt: Prompt) -> PlannedPrompt:
        """The prompt of any task as tokens.

        Raises:
            PromptError: if the media do not fit the task or are none.
        """
        infos = [self._probe(prompt, number) for number in range(len(prompt.media))]
        frames_given = prompt.task is Task.I2V
        record = _record(prompt, [] if frames_given else [info.kind for info in infos])
        prompts = self.data.prompts
        if prompt.task is Task.T2I:
            prompts = replace(prompts, generation=prompts.generation_image_inference)
        try:
            pieces = outline(record, prompt.task, prompts, Dropout())
        except RecordError as error:
            what = str(error).removeprefix(record.sample_id)
            raise PromptError(f"{_where(prompt)}{what}; correct the prompt") from None
        visuals = tuple(
            self._target(prompt, infos)
            if piece.media.element == TARGET
            else self._condition(prompt, piece, infos[int(piece.media.element)])
            for piece in pieces
            if isinstance(piece, Block)
        )
        segments = [visual.segment for visual in visuals]
        return PlannedPrompt(
            prompt, *assemble(prompt.name, prompt.task, pieces, segments, self.tokenizer), visuals=visuals
        )

    def _probe(self, prompt: Prompt, number: int) -> MediaInfo:
        try:
            return probe(prompt.media[number])
        except MediaError as error:
            raise _unreadable(prompt, number, error, "give a picture or clip") from None

    def _frames(self, info: MediaInfo, task: Task) -> tuple[int, ...]:
        """Frame numbers of a condition."""
        if info.kind == "image":
            return (0,)
        seconds = self.data.max_seconds_generation if task.is_generation else self.data.max_seconds_understanding
        return sample_frames(info.n_frames, info.average_fps, self.data.target_fps, seconds, self.data.frame_sampling)

    def _condition(self, prompt: Prompt, block: Block, info: MediaInfo) -> _Plan:
        """A condition's segment and how it is decoded."""
        try:
            frames = self._frames(info, prompt.task)
        except ValueError as error:
            raise PromptError(f"{_where(prompt)}: {error}") from None
        if block.kind is SegmentKind.VIT:
            resolution, size, grid, normalize = self.data.vit_resolution, vit_size, vit_grid, "vit"
        else:
            resolution, size, grid, normalize = self.data.vae_resolution, vae_size, vae_grid, "vae"
        final, bucket = size(info.width, info.height, resolution), bucket_size(info.width, info.height, resolution)
        data = prompt.media[int(block.media.element)]
        segment = Segment.visual(block.kind, grid(len(frames), final))
        return _Plan(segment, DecodeRequest(data, frames, bucket, final, normalize))

    def _target(self, prompt: Prompt, infos: Sequence[MediaInfo]) -> _Plan:
        """What is generated."""
        size, frames = prompt.size, prompt.frames
        if prompt.task.is_edit and infos:
            size = size or vae_size(infos[0].width, infos[0].height, self.data.vae_resolution)
            frames = frames or len(self._frames(infos[0], prompt.task))
        if prompt.task.makes == "image":
            frames = 1
        if size is None or frames is None:
            raise PromptError(f"{_where(prompt)}: task {prompt.task} needs a size and a number of frames; give both")
        grid = vae_grid(frames, size)
        clean = _condition_frames(prompt, grid[0]) if prompt.task is Task.I2V else ()
        return _Plan(Segment.visual(SegmentKind.NOISE, grid, clean), None)


class RequestBuilder:
    """Builds requests and questions; every rank builds the same.

    Args:
        planner: of prompts.
        decoder: of this rank.
        vit: frozen.
        vae: frozen.
    """

    def __init__(self, planner: PromptPlanner, decoder: MediaDecoder, vit: VitEncoder, vae: VideoAutoencoder) -> None:
        self.planner, self.decoder, self.vit, self.vae = planner, decoder, vit, vae

    def request(self, prompt: Prompt) -> Request:
        """A picture or clip to generate.

        Raises:
            PromptError: if the media do not fit the task or cannot be read.
        """
        planned = self.planner.plan(prompt)
        vit, latents = self._encode(planned)
        return Request(planned.sample, torch.tensor(planned.token_ids), torch.cat(latents), vit)

    def question(self, prompt: Prompt) -> Question:
        """A text to continue.

        Raises:
            PromptError: if the media do not fit the task or cannot be read.
        """
        planned = self.planner.plan(prompt)
        sample = planned.sample
        start = sample.label_spans[0][0]
        tail = sample.segments[-1].length - (sample.length - start)
        shape = replace(sample, segments=(*sample.segments[:-1], Segment.text(tail)), label_spans=())
        return Question(shape, torch.tensor(planned.token_ids[:start]), self._encode(planned)[0])

    def _decode(self, prompt: Prompt, requests: Sequence[DecodeRequest]) -> list[torch.Tensor]:
        pixels = []
        for request, result in zip(requests, self.decoder(requests), strict=True):
            if isinstance(result, MediaError):
                raise _unreadable(prompt, prompt.media.index(request.data), result, "give a whole file")
            pixels.append(result)
        return pixels

    def _encode(self, planned: PlannedPrompt) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(ViT rows of all conditions, latent rows of every VAE segment; zeros for what is generated)."""
        pixels = iter(
            self._decode(planned.prompt, [plan.decode for plan in planned.visuals if plan.decode is not None])
        )
        features, latents = [torch.zeros(0, self.vit.width)], []
        for plan in planned.visuals:
            if plan.decode is None:
                latents.append(self._target_rows(planned.prompt, plan.segment))
            elif plan.segment.kind is SegmentKind.VIT:
                features.append(self.vit.encode([next(pixels)])[0].float().cpu())
            else:
                latents.append(self.vae.encode(next(pixels)).flatten(end_dim=-2).float().cpu())
        return torch.cat(features), latents

    def _target_rows(self, prompt: Prompt, segment: Segment) -> torch.Tensor:
        """Latent rows of the target, zeros but for its frame conditions.

        Each condition is encoded as a clip that stands still, whose first latent frame is that of the picture and
        whose last that of a clip's end, as training has them.
        """
        t, h, w = segment.grid or (0, 0, 0)
        rows = torch.zeros(t, h, w, self.vae.latent_channels)
        requests = [DecodeRequest(data, (0,), (16 * h, 16 * w), (16 * h, 16 * w), "vae") for data in prompt.media]
        if segment.clean_frames:
            for frame, pixels in zip(segment.clean_frames, self._decode(prompt, requests), strict=True):
                still = self.vae.encode(pixels.repeat(1, 1 if frame == 0 else STILL_FRAMES, 1, 1))
                rows[frame] = still[-1].float().cpu()
        return rows.flatten(end_dim=-2)


def _where(prompt: Prompt) -> str:
    return prompt.where or prompt.name


def _unreadable(prompt: Prompt, number: int, error: MediaError, remedy: str) -> PromptError:
    return PromptError(f"{_where(prompt)}: medium {number + 1} of {len(prompt.media)}: {error}; {remedy}")


def _record(prompt: Prompt, kinds: Sequence[str]) -> Record:
    """The prompt as a row of data would hold it; a text target stands for the answer that is to come."""
    media = [Media(kind, str(number)) for number, kind in enumerate(kinds)]
    inputs: tuple[str | Media, ...] = (*media, prompt.text)
    target: Media | str = Media(prompt.task.makes, TARGET) if prompt.task.is_generation else "x"
    return Record(prompt.name, "prompt", 0, "", inputs, target)


def _condition_frames(prompt: Prompt, latent_frames: int) -> tuple[int, ...]:
    """Latent frames that an I2V prompt gives.

    Raises:
        PromptError: if it gives none or too many, or no frame is left to generate.
    """
    where = _where(prompt)
    if len(prompt.media) not in (1, 2):
        raise PromptError(f"{where}: has {len(prompt.media)} media; i2v takes the first frame, or first and last")
    frames = (0,) if len(prompt.media) == 1 else (0, latent_frames - 1)
    if latent_frames <= len(frames):
        raise PromptError(f"{where}: {latent_frames} latent frames leave none to generate; ask for more frames")
    return frames
