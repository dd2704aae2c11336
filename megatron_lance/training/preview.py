"""Sample pictures during training, for TensorBoard.

Station: step -> [sampling engine on fixed captions] -> metrics.  All ranks of a replica take part; noise is fixed, so
pictures of different steps are comparable.
"""

from __future__ import annotations

from contextlib import nullcontext

from megatron_lance.config.schema import PreviewConfig, RunConfig
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.packing.sample import Task
from megatron_lance.parallel.groups import Groups
from megatron_lance.sampling.engine import Encoders, Engine
from megatron_lance.sampling.flow_sampler import SamplerSettings
from megatron_lance.sampling.media import Frames
from megatron_lance.sampling.passes import ModelPasses
from megatron_lance.sampling.requests import Prompt
from megatron_lance.training.setup import Trainee


class Preview:
    """Draws the configured captions with the weights of the moment.

    Args:
        run: the whole configuration.
        trainee: the model.
        groups: degrees and ranks.
        tokenizer: of the run.
        encoders: the frozen parts.
    """

    def __init__(
        self, run: RunConfig, trainee: Trainee, groups: Groups, tokenizer: Tokenizer, encoders: Encoders
    ) -> None:
        settings: PreviewConfig = run.preview
        self.average = trainee.average if settings.ema else None
        self.captions, self.seed = settings.captions, run.training.seed
        passes = ModelPasses(trainee.stages, run.model, groups, run.parallel.region_alignment)
        self.engine = Engine(run, passes, encoders, tokenizer)
        self.sampler = SamplerSettings(settings.steps, settings.shift, settings.scale)
        size = (settings.height, settings.width)
        self.prompts = [
            Prompt(f"preview {i}", Task.T2I, caption, (), size, 1) for i, caption in enumerate(settings.captions)
        ]

    def draw(self) -> list[Frames]:
        """One picture per caption, uint8 [1, H, W, 3]; a collective of the replica."""
        with nullcontext() if self.average is None else self.average.applied():
            return self.engine.generate(self.prompts, [self.seed] * len(self.prompts), self.sampler)
