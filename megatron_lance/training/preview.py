"""Sample pictures during training, for TensorBoard.

Station: step -> [sampler on fixed captions] -> metrics.  All ranks of a replica take part; noise is fixed, so pictures
of different steps are comparable.
"""

from __future__ import annotations

import torch

from megatron_lance.config.schema import PreviewConfig, RunConfig
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.sizes import vae_grid
from megatron_lance.encoders.vae import VideoAutoencoder
from megatron_lance.parallel.groups import Groups
from megatron_lance.sampling.flow_sampler import SamplerSettings, initial_noise, sample
from megatron_lance.sampling.media import Frames, to_frames
from megatron_lance.sampling.requests import text_to_visual
from megatron_lance.sampling.velocity import ModelVelocity
from megatron_lance.training.setup import Trainee


class Preview:
    """Draws the configured captions with the weights of the moment.

    Args:
        run: the whole configuration.
        trainee: the model.
        groups: degrees and ranks.
        tokenizer: of the run.
        vae: decodes the latents.
    """

    def __init__(
        self, run: RunConfig, trainee: Trainee, groups: Groups, tokenizer: Tokenizer, vae: VideoAutoencoder
    ) -> None:
        settings: PreviewConfig = run.preview
        self.vae, self.device, self.seed = vae, groups.device, run.training.seed
        self.channels = run.model.latent_channels
        self.captions = settings.captions
        self.velocity = ModelVelocity(trainee.stages, run.model, groups, run.parallel.region_alignment)
        self.sampler = SamplerSettings(settings.steps, settings.shift, settings.scale)
        grid = vae_grid(1, (settings.height, settings.width))
        self.requests = [
            text_to_visual(f"preview {i}", caption, grid, tokenizer, run.data.prompts, self.channels)
            for i, caption in enumerate(settings.captions)
        ]

    @torch.no_grad()
    def draw(self) -> list[Frames]:
        """One picture per caption, uint8 [1, H, W, 3]; a collective of the replica."""
        noise = initial_noise(self.requests, self.channels, self.seed)
        latents = sample(self.requests, noise, self.velocity, self.sampler)
        return [to_frames(self.vae.decode(latent.to(self.device)).cpu()) for latent in latents]
