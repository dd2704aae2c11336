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
from megatron_lance.packing.sample import Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.sampling.flow_sampler import Request
from megatron_lance.sampling.text_decoder import Question

TARGET = "target"
"""Element name of what is to be generated."""


@dataclass(frozen=True)
class Prompt:
    """One thing to sample.

    Attributes:
        name: addresses the noise, and names the prompt in errors.
        task: what is sampled.
        text: caption, instruction or question.
        media: files of the conditions, in order: sources and references, or for I2V the first and maybe the last frame.
        size: (H, W) of the target, pixels, multiples of 16; an edit takes its source's if None.
        frames: of the target clip, 4k+1; an edit takes its source's if None.
    """

    name: str
    task: Task
    text: str
    media: tuple[bytes, ...] = ()
    size: tuple[int, int] | None = None
    frames: int | None = None


@dataclass(frozen=True)
class _Plan:
    """A visual segment and how to get its content: a decode request, or nothing for the target."""

    segment: Segment
    decode: DecodeRequest | None


class PromptError(UserError):
    """A prompt that cannot be sampled; the message names it and the rule."""


class RequestBuilder:
    """Builds requests and questions; every rank builds the same.

    Args:
        data: prompts, resolutions, frame sampling.
        tokenizer: of the model.
        decoder: of this rank.
        vit: frozen.
        vae: frozen.
    """

    def __init__(
        self, data: DataConfig, tokenizer: Tokenizer, decoder: MediaDecoder, vit: VitEncoder, vae: VideoAutoencoder
    ) -> None:
        self.data, self.tokenizer, self.decoder, self.vit, self.vae = data, tokenizer, decoder, vit, vae

    def request(self, prompt: Prompt) -> Request:
        """A picture or clip to generate.

        Raises:
            PromptError: if the media do not fit the task or cannot be read.
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
            raise PromptError(str(error)) from None
        size, frames = self._target(prompt, infos)
        clean_frames = _condition_frames(prompt, vae_grid(frames, size)[0]) if frames_given else ()
        plans = [
            _Plan(Segment.visual(SegmentKind.NOISE, vae_grid(frames, size), clean_frames), None)
            if piece.media.element == TARGET
            else self._plan(prompt, piece, infos[int(piece.media.element)])
            for piece in pieces
            if isinstance(piece, Block)
        ]
        sample, ids = assemble(prompt.name, prompt.task, pieces, [plan.segment for plan in plans], self.tokenizer)
        vit, latents = self._encode(prompt, plans)
        if frames_given:
            latents[-1] = self._frame_conditions(prompt, size, frames, clean_frames)
        return Request(sample, torch.tensor(ids), torch.cat(latents), vit)

    def question(self, prompt: Prompt) -> Question:
        """A text to continue.

        Raises:
            PromptError: if the media do not fit the task or cannot be read.
        """
        infos = [self._probe(prompt, number) for number in range(len(prompt.media))]
        try:
            pieces = outline(_record(prompt, [info.kind for info in infos]), prompt.task, self.data.prompts, Dropout())
        except RecordError as error:
            raise PromptError(str(error)) from None
        blocks = [piece for piece in pieces if isinstance(piece, Block)]
        plans = [self._plan(prompt, block, infos[int(block.media.element)]) for block in blocks]
        sample, ids = assemble(prompt.name, prompt.task, pieces, [plan.segment for plan in plans], self.tokenizer)
        start = sample.label_spans[0][0]
        tail = sample.segments[-1].length - (sample.length - start)
        shape = replace(sample, segments=(*sample.segments[:-1], Segment.text(tail)), label_spans=())
        return Question(shape, torch.tensor(ids[:start]), self._encode(prompt, plans)[0])

    def _probe(self, prompt: Prompt, number: int) -> MediaInfo:
        try:
            return probe(prompt.media[number])
        except MediaError as error:
            raise PromptError(f"{prompt.name}: medium {number}: {error}; give a picture or clip") from None

    def _frames(self, info: MediaInfo, task: Task) -> tuple[int, ...]:
        """Frame numbers of a condition."""
        if info.kind == "image":
            return (0,)
        seconds = self.data.max_seconds_generation if task.is_generation else self.data.max_seconds_understanding
        return sample_frames(info.n_frames, info.average_fps, self.data.target_fps, seconds, self.data.frame_sampling)

    def _plan(self, prompt: Prompt, block: Block, info: MediaInfo) -> _Plan:
        """A condition's segment and how it is decoded."""
        try:
            frames = self._frames(info, prompt.task)
        except ValueError as error:
            raise PromptError(f"{prompt.name}: {error}") from None
        if block.kind is SegmentKind.VIT:
            resolution, size, grid, normalize = self.data.vit_resolution, vit_size, vit_grid, "vit"
        else:
            resolution, size, grid, normalize = self.data.vae_resolution, vae_size, vae_grid, "vae"
        final, bucket = size(info.width, info.height, resolution), bucket_size(info.width, info.height, resolution)
        data = prompt.media[int(block.media.element)]
        segment = Segment.visual(block.kind, grid(len(frames), final))
        return _Plan(segment, DecodeRequest(data, frames, bucket, final, normalize))

    def _target(self, prompt: Prompt, infos: Sequence[MediaInfo]) -> tuple[tuple[int, int], int]:
        """((H, W), frames) of what is generated."""
        size, frames = prompt.size, prompt.frames
        if prompt.task.is_edit and infos:
            size = size or vae_size(infos[0].width, infos[0].height, self.data.vae_resolution)
            frames = frames or len(self._frames(infos[0], prompt.task))
        if prompt.task in (Task.T2I, Task.I_EDIT, Task.S2I):
            frames = 1
        if size is None or frames is None:
            raise PromptError(f"{prompt.name}: task {prompt.task} needs a size and a number of frames; give both")
        return size, frames

    def _decode(self, prompt: Prompt, requests: Sequence[DecodeRequest]) -> list[torch.Tensor]:
        pixels = []
        for request, result in zip(requests, self.decoder(requests), strict=True):
            if isinstance(result, MediaError):
                number = prompt.media.index(request.data)
                raise PromptError(f"{prompt.name}: medium {number}: {result}; give a whole file")
            pixels.append(result)
        return pixels

    def _encode(self, prompt: Prompt, plans: Sequence[_Plan]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(ViT rows of all conditions, latent rows of every VAE segment; zeros for the target)."""
        wanted = [plan for plan in plans if plan.decode is not None]
        pixels = iter(self._decode(prompt, [plan.decode for plan in wanted if plan.decode is not None]))
        features, latents = [torch.zeros(0, self.vit.width)], []
        for plan in plans:
            if plan.decode is None:
                latents.append(torch.zeros(plan.segment.content_length, self.vae.latent_channels))
            elif plan.segment.kind is SegmentKind.VIT:
                features.append(self.vit.encode([next(pixels)])[0].float().cpu())
            else:
                latents.append(self.vae.encode(next(pixels)).flatten(end_dim=-2).float().cpu())
        return torch.cat(features), latents

    def _frame_conditions(
        self, prompt: Prompt, size: tuple[int, int], frames: int, clean_frames: Sequence[int]
    ) -> torch.Tensor:
        """Latent rows of an I2V target whose condition frames are set, each encoded as a picture."""
        t, h, w = vae_grid(frames, size)
        rows = torch.zeros(t, h, w, self.vae.latent_channels)
        requests = [DecodeRequest(data, (0,), size, size, "vae") for data in prompt.media]
        for frame, pixels in zip(clean_frames, self._decode(prompt, requests), strict=True):
            rows[frame] = self.vae.encode(pixels)[0].float().cpu()
        return rows.flatten(end_dim=-2)


def _record(prompt: Prompt, kinds: Sequence[str]) -> Record:
    """The prompt as a row of data would hold it; a text target stands for the answer that is to come."""
    media = [Media(kind, str(number)) for number, kind in enumerate(kinds)]
    inputs: tuple[str | Media, ...] = (*media, prompt.text)
    picture = prompt.task in (Task.T2I, Task.I_EDIT, Task.S2I)
    target: Media | str = Media("image" if picture else "video", TARGET) if prompt.task.is_generation else "x"
    return Record(prompt.name, "prompt", 0, "", inputs, target)


def _condition_frames(prompt: Prompt, latent_frames: int) -> tuple[int, ...]:
    """Latent frames that an I2V prompt gives.

    Raises:
        PromptError: if it gives none or too many, or no frame is left to generate.
    """
    if len(prompt.media) not in (1, 2):
        raise PromptError(f"{prompt.name}: has {len(prompt.media)} media; i2v takes the first frame, or first and last")
    frames = (0,) if len(prompt.media) == 1 else (0, latent_frames - 1)
    if latent_frames <= len(frames):
        raise PromptError(f"{prompt.name}: {latent_frames} latent frames leave none to generate; ask for more frames")
    return frames
