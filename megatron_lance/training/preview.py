"""Sample fixed prompts of every task during training.

Station: step -> [sampling engine on a prompt list] -> metrics.  Noise is fixed, so samples of different steps are
comparable; they are those of tools/sample.py with the same settings.  Replicas share the batches out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.schema import RunConfig
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.parallel.groups import Groups
from megatron_lance.sampling.batches import HowToSample, Sampled, rounds, sample_round
from megatron_lance.sampling.engine import Encoders, Engine
from megatron_lance.sampling.flow_sampler import SamplerSettings
from megatron_lance.sampling.passes import ModelPasses
from megatron_lance.sampling.prompt_list import Defaults, Line, check_sizes, read_list
from megatron_lance.sampling.text_decoder import DecoderSettings
from megatron_lance.training.setup import Trainee
from megatron_lance.training.validation import is_time_up

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """What was sampled after a step; on the first rank.

    Attributes:
        step: steps done before it.
        found: lines and their results, in the order of the list.
        prompts: of the list; more than were sampled where the time was up.
        fps: frames per second of clips.
        averaged: whether the weights were the averaged ones.
        seconds: that training stood still for it.
    """

    step: int
    found: Sequence[tuple[Line, Sampled]]
    prompts: int
    fps: float
    averaged: bool
    seconds: float


def read_prompts(run: RunConfig) -> list[Line]:
    """The lines of `preview.prompts`; sizes that they do not say come from the section, but an edit's.

    Raises:
        PromptError: naming what is wrong with the list.
    """
    settings = run.preview
    path = Path(settings.prompts)
    lines = read_list(path, Defaults(None, None, None, run.training.seed), f"preview.prompts {path}")
    size, frames = (settings.height, settings.width), settings.frames
    sized = [
        line if line.task.is_edit else replace(line, size=line.size or size, frames=line.frames or frames)
        for line in lines
    ]
    check_sizes(sized, run.model)
    return sized


class Preview:
    """Samples the configured prompts with the weights of the moment.

    Args:
        run: the whole configuration.
        trainee: the model.
        groups: degrees and ranks.
        tokenizer: of the run.
        encoders: the frozen parts.
        lines: from `read_prompts`.

    Raises:
        PromptError: if the media of a line do not fit its task or cannot be read.
    """

    def __init__(
        self,
        run: RunConfig,
        trainee: Trainee,
        groups: Groups,
        tokenizer: Tokenizer,
        encoders: Encoders,
        lines: Sequence[Line],
    ) -> None:
        settings = run.preview
        self.settings, self.trainee, self.groups = settings, trainee, groups
        passes = ModelPasses(trainee.stages, run.model, groups, row_alignment(run))
        self.engine = Engine(run, passes, encoders, tokenizer)
        self.how = HowToSample(
            SamplerSettings(settings.steps, settings.shift, settings.scale, settings.visual_scale),
            DecoderSettings(settings.max_tokens),
            self.engine.velocity.mape,
        )
        self.lines = list(lines)
        for line in self.lines:
            self.engine.check(line.prompt(0, line.read_media()))

    def sample(self, step: int, beat: Callable[[], None], asked: Callable[[], bool]) -> Samples:
        """Sample all prompts, or as many as there is time for; a collective of the world.

        Args:
            step: steps done.
            beat: called before each pass of the model.
            asked: whether this rank is asked to stop; nothing further is begun then.
        """
        start, settings = time.perf_counter(), self.settings
        found: dict[int, Sampled] = {}
        self.engine.passes.before = beat
        with self.trainee.at_rest(averaged=settings.ema):
            for batches in rounds([(line, 0) for line in self.lines], settings.batch, self.groups.dp):
                found |= {line.number: result for (line, _), result in sample_round(self.engine, batches, self.how)}
                if is_time_up(start, settings.max_seconds, asked(), self.groups):
                    break
        done = [(line, found[line.number]) for line in self.lines if line.number in found]
        if dist.get_rank() == 0 and len(done) < len(self.lines):
            logger.warning(
                "preview: ended by preview.max_seconds %s or a stop after %d of %d prompts",
                *(settings.max_seconds, len(done), len(self.lines)),
            )
        seconds = time.perf_counter() - start
        return Samples(step, done, len(self.lines), self.engine.fps, settings.ema, seconds)
