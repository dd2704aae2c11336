"""Prompts in, pictures, clips and answers out.

Station: prompts -> [requests -> sampler -> VAE decoder; questions -> text decoder] -> files, TensorBoard.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from megatron_lance.config.schema import RunConfig
from megatron_lance.data.decode import MediaDecoder
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.encoders.vae import VideoAutoencoder
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.packing.positions import Mape
from megatron_lance.sampling.flow_sampler import SamplerSettings, initial_noise, sample
from megatron_lance.sampling.media import Frames, mp4_bytes, to_frames
from megatron_lance.sampling.passes import ModelPasses
from megatron_lance.sampling.requests import Prompt, PromptPlanner, RequestBuilder
from megatron_lance.sampling.text_decoder import DecoderSettings, decode
from megatron_lance.sampling.velocity import ModelVelocity


@dataclass(frozen=True)
class Encoders:
    """The frozen parts and the decoder of one rank.

    Attributes:
        decoder: of media files.
        vit: encodes conditions.
        vae: encodes conditions and decodes results.
    """

    decoder: MediaDecoder
    vit: VitEncoder
    vae: VideoAutoencoder


class Engine:
    """Samples on any layout; every call is a collective of the replica.

    Args:
        run: prompts, resolutions, sizes.
        passes: runs the model.
        encoders: of this rank.
        tokenizer: of the model.
        cached: keep the context's keys and values between steps.
    """

    def __init__(
        self, run: RunConfig, passes: ModelPasses, encoders: Encoders, tokenizer: Tokenizer, cached: bool = True
    ) -> None:
        self.passes, self.tokenizer, self.cached = passes, tokenizer, cached
        self.vae, self.device = encoders.vae, passes.groups.device
        self.channels, self.fps = run.model.latent_channels, run.data.target_fps
        planner = PromptPlanner(run.data, tokenizer)
        self.builder = RequestBuilder(planner, encoders.decoder, encoders.vit, encoders.vae)
        self.velocity = ModelVelocity(passes, cached)

    @torch.no_grad()
    def check(self, prompt: Prompt) -> None:
        """Raise PromptError unless the prompt can be sampled, its media read and encoded."""
        self.builder.request(prompt) if prompt.task.is_generation else self.builder.question(prompt)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], settings: SamplerSettings) -> list[Frames]:
        """A picture or clip for every prompt; all in one pack per branch and step.

        Args:
            prompts: of generation tasks, of any sizes.
            seeds: of each prompt's noise.
            settings: steps, shift, guidance.

        Returns:
            uint8 [T, H, W, 3] each.

        Raises:
            PromptError: naming the prompt that cannot be sampled.
        """
        requests = [self.builder.request(prompt) for prompt in prompts]
        noise = [initial_noise([r], self.channels, seed)[0] for r, seed in zip(requests, seeds, strict=True)]
        latents = sample(requests, noise, self.velocity, settings)
        self.velocity.forget()
        return [to_frames(self.vae.decode(latent.to(self.device)).cpu()) for latent in latents]

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], settings: DecoderSettings, mape: Mape
    ) -> list[str]:
        """An answer for every prompt of an understanding task; all in one pack per token.

        Args:
            prompts: questions with their media.
            seeds: of each prompt's draws.
            settings: greedy or top-p, longest answer.
            mape: the positions' rule (spec/model.md section 7).
        """
        questions = [self.builder.question(prompt) for prompt in prompts]
        answers = decode(questions, seeds, self.passes, settings, self.tokenizer.im_end, mape, self.cached)
        return [self.tokenizer.decode(ids) for ids in answers]

    def as_medium(self, frames: Frames) -> bytes:
        """A result as a file, so that it can be the source of the next edit: PNG, or MP4 of several frames."""
        if len(frames) > 1:
            return mp4_bytes(frames, self.fps)
        buffer = io.BytesIO()
        Image.fromarray(frames[0]).save(buffer, format="PNG")
        return buffer.getvalue()
