"""A tiny model in one process, for tests of the model and of what is built on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from megatron_lance.checkpoint.hf_lance import RandomSource, load_weights
from megatron_lance.config.schema import ModelConfig, ObjectiveConfig, ParallelConfig
from megatron_lance.model.heads import HeadOutputs
from megatron_lance.model.lance_model import LanceModel, build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.objectives.losses import LossCounts, total_loss, velocity_error, weighted_sum
from megatron_lance.packing.batch import PackNoise, PackTokens, PackVisuals
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.parallel import groups
from megatron_lance.parallel.dispatch import RankBatch, rank_batch
from tests.strategies import pack_values

TINY = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
    mrope_section=(1, 1, 2),
    latent_channels=4,
    latent_position_frames=3,
    latent_position_size=4,
    attention_backend="sdpa",  # on a GPU too: no trial, the same bits each time
)
TOKENIZER_SIZE = 50
OBJECTIVE = ObjectiveConfig()

Values = tuple[PackTokens, PackVisuals, PackNoise]


@contextmanager
def one_rank() -> Iterator[groups.Groups]:
    """Process groups of one rank; left behind destroyed."""
    try:
        yield groups.initialize(ParallelConfig(), seed=1)
    finally:
        groups.destroy()


def build(
    model: ModelConfig = TINY,
    *,
    precision: str = "float32",
    recompute: str | None = None,
    modules: tuple[str, ...] = ("core_attn",),
    experts: tuple[str, ...] = ("und", "gen"),
    offload: int = 0,
) -> LanceModel:
    """The whole model with random weights that depend on names only; biases and norms are not trivial."""
    parallel = ParallelConfig(
        recompute_granularity=recompute, recompute_modules=modules, recompute_experts=experts, offload_layers=offload
    )
    (stage,) = build_stages(transformer_config(model, parallel, precision), model, TOKENIZER_SIZE)
    load_weights([stage], RandomSource(3, model), model, tp_rank=0, tp=1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    return stage


def mixed_pack() -> Pack:
    """Every kind of segment: understanding with an answer, an edit, frame-to-video, text only."""
    text, vit, clean, noise = Segment.text, SegmentKind.VIT, SegmentKind.CLEAN, SegmentKind.NOISE
    understanding = (text(3), Segment.visual(vit, (1, 2, 2)), text(5))
    edit = (
        text(2),
        Segment.visual(vit, (1, 1, 2)),
        Segment.visual(clean, (1, 2, 2)),
        text(2),
        Segment.visual(noise, (1, 2, 2)),
        text(1),
    )
    video = (text(2), Segment.visual(noise, (3, 1, 2), (0,)), text(1))
    return pack_of(
        Sample("answer", Task.I2T, understanding, ((11, 14),)),
        Sample("edit", Task.I_EDIT, edit),
        Sample("video", Task.I2V, video),
        Sample("talk", Task.T2T, (text(6),), ((2, 6),)),
    )


def pack_of(*samples: Sample, spare: int = 5) -> Pack:
    return Pack(samples, sum(s.length for s in samples) + spare)


def values_of(pack: Pack, seed: int = 0) -> Values:
    return pack_values(pack, seed, vocabulary=TOKENIZER_SIZE, hidden=TINY.hidden_size, channels=TINY.latent_channels)


def batch_of(pack: Pack, values: Values, alignment: int = 4) -> tuple[Layout, RankBatch]:
    layout = Layout.build(pack, 1, 1, alignment)
    return layout, rank_batch(pack, layout, *values, mape=Mape.RELEASE, mape_step=1000, cp_rank=0, tp_rank=0)


@dataclass(frozen=True)
class Result:
    """One pass: the loss, gradients by parameter name, the heads' outputs."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    outputs: HeadOutputs


def forward_backward(model: LanceModel, pack: Pack, batch: RankBatch) -> Result:
    model.zero_grad(set_to_none=True)
    outputs = model(batch)
    assert isinstance(outputs, HeadOutputs)
    loss = total_loss(
        weighted_sum(outputs.ce, batch.ce_weights),
        weighted_sum(velocity_error(outputs.velocity, batch.target), batch.velocity_weights),
        LossCounts.of([pack]),
        ce_weight=OBJECTIVE.ce_weight,
        mse_weight=OBJECTIVE.mse_weight,
    )
    loss.backward()
    return Result(loss.detach(), {name: p.grad for name, p in model.named_parameters()}, outputs)


def with_model(**changes: object) -> ModelConfig:
    """The tiny configuration with some fields changed."""
    return replace(TINY, **changes)  # type: ignore[arg-type]
