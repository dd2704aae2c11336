"""The same step on other layouts: what is trained on, the layouts, and how results are compared.

Station: fixed packs and values -> a step on each layout -> [differences against one rank].  Parity compares with the
public reference, equivalence with our own other layout (design, words).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_lance.config.schema import ModelConfig
from megatron_lance.objectives.random_values import FilledPack
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind

TOKENIZER_SIZE = 500
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=512,
    mrope_section=(2, 3, 3),
    latent_channels=8,
    latent_position_frames=6,
    latent_position_size=16,
)
"""Two key/value heads as Lance has, and enough layers for four stages or virtual stages."""
CAPACITY = 2304
"""Tokens of a pack."""


@dataclass(frozen=True)
class NamedLayout:
    """One way to spread a model over ranks.

    Attributes:
        name: as said on the command line.
        ranks: processes it takes.
        parallel: fields of ParallelConfig that differ from the defaults.
    """

    name: str
    ranks: int
    parallel: Mapping[str, Any] = field(default_factory=dict)


def _layout(name: str, *, tp: int = 1, pp: int = 1, cp: int = 1, dp: int = 1, **more: Any) -> NamedLayout:
    degrees = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
    }
    return NamedLayout(name, tp * pp * cp * dp, {**degrees, **more})


_SELECTIVE: dict[str, Any] = {"recompute_granularity": "selective"}
_ALL: dict[str, Any] = {**_SELECTIVE, "recompute_modules": ("core_attn", "layernorm", "mlp")}
_OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
ONE_RANK = _layout("one")
LAYOUTS: dict[str, NamedLayout] = {
    layout.name: layout
    for layout in (
        _layout("tp2", tp=2),
        _layout("tp4", tp=4),
        _layout("pp2", pp=2),
        _layout("pp4", pp=4),
        _layout("pp2-vpp2", pp=2, virtual_pipeline_model_parallel_size=2),
        _layout("pp2-uneven", pp=2, num_layers_in_first_pipeline_stage=1),
        _layout("pp3-uneven", pp=3, num_layers_in_first_pipeline_stage=1, num_layers_in_last_pipeline_stage=1),
        _layout("cp2", cp=2),
        _layout("cp3", cp=3),
        _layout("cp4", cp=4),
        _layout("cp8", cp=8),
        _layout("tp2-cp2", tp=2, cp=2),
        _layout("tp4-cp2", tp=4, cp=2),
        _layout("tp2-pp2", tp=2, pp=2),
        _layout("cp2-pp2", cp=2, pp=2),
        _layout("tp2-pp2-cp2", tp=2, pp=2, cp=2),
        _layout("dp2", dp=2),
        _layout("dp4", dp=4),
        _layout("dp2-cp2", dp=2, cp=2),
        _layout("dp2-distributed-optimizer", dp=2, use_distributed_optimizer=True),
        _layout("dp2-overlap", dp=2, **_OVERLAP),
        _layout("dp2-cp2-overlap", dp=2, cp=2, **_OVERLAP),
        _layout("dp2-tp2-overlap-grad", dp=2, tp=2, overlap_grad_reduce=True),
        _layout("pp2-vpp2-dp2-overlap", pp=2, dp=2, virtual_pipeline_model_parallel_size=2, **_OVERLAP),
        _layout("tp2-cp2-core-attn", tp=2, cp=2, recompute_modules=("core_attn",), **_SELECTIVE),
        _layout("tp2-layernorm-mlp", tp=2, recompute_modules=("layernorm", "mlp"), **_SELECTIVE),
        _layout("cp2-pp2-all-modules", cp=2, pp=2, **_ALL),
        _layout("tp2-cp2-full", tp=2, cp=2, recompute_granularity="full"),
        _layout("pp2-full", pp=2, recompute_granularity="full"),
        _layout("tp2-recompute-gen", tp=2, recompute_experts=("gen",), **_ALL),
        _layout("pp2-offload", pp=2, offload_layers=2),
        _layout("cp2-pp2-vpp2-offload", cp=2, pp=2, virtual_pipeline_model_parallel_size=2, offload_layers=1, **_ALL),
    )
}
"""Every layout that is checked; the reference is ONE_RANK."""
FEW = (
    *("tp4", "dp4", "pp2-vpp2", "cp3", "tp2-pp2-cp2", "dp2-cp2-overlap", "tp2-cp2-core-attn"),
    *("pp2-offload", "cp2-pp2-vpp2-offload"),
)
"""What continuous integration checks."""


def _sample(name: str, task: Task, *segments: Segment, answer: int = 0) -> Sample:
    length = sum(s.length for s in segments)
    return Sample(name, task, segments, ((length - answer, length),) if answer else ())


def all_tasks() -> list[list[Sample]]:
    """Packs that together hold every task."""
    text = Segment.text
    vit, clean, noise = SegmentKind.VIT, SegmentKind.CLEAN, SegmentKind.NOISE

    def block(kind: SegmentKind, t: int, h: int, w: int, frames: tuple[int, ...] = ()) -> Segment:
        return Segment.visual(kind, (t, h, w), frames)

    reference = (block(vit, 1, 6, 6), block(clean, 1, 10, 10))
    return [
        [
            _sample(
                "v_edit",
                Task.V_EDIT,
                text(30),
                block(vit, 6, 5, 7),
                block(clean, 4, 12, 12),
                text(41),
                block(noise, 4, 12, 12),
                text(1),
            ),
            _sample("i2t", Task.I2T, text(20), block(vit, 1, 9, 9), text(70), answer=40),
            _sample("t2i", Task.T2I, text(60), block(noise, 1, 12, 12), text(1)),
        ],
        [
            _sample("t2v", Task.T2V, text(77), block(noise, 5, 9, 11), text(1)),
            _sample("t2t", Task.T2T, text(300), answer=120),
            _sample("s2i", Task.S2I, text(25), *reference, *reference, text(33), block(noise, 1, 10, 10), text(1)),
            _sample("v2t", Task.V2T, text(31), block(vit, 8, 7, 7), text(55), answer=17),
        ],
        [
            _sample("ff2v", Task.I2V, text(45), block(noise, 5, 8, 8, (0,)), text(1)),
            _sample("flf2v", Task.I2V, text(45), block(noise, 4, 9, 8, (0, 3)), text(1)),
            _sample(
                "i_edit",
                Task.I_EDIT,
                text(30),
                block(vit, 1, 9, 9),
                block(clean, 1, 14, 14),
                text(25),
                block(noise, 1, 14, 14),
                text(1),
            ),
        ],
        [_sample("s2v", Task.S2V, text(25), *reference, text(40), block(noise, 5, 12, 12), text(1))],
    ]


def _scarce() -> list[list[Sample]]:
    """Packs of which one has no generation token, one no answer, one a single noise sample, one hardly anything."""
    noise = Segment.visual(SegmentKind.NOISE, (1, 12, 12))
    return [
        [_sample("words", Task.T2T, Segment.text(700), answer=300)],
        [_sample(f"picture {i}", Task.T2I, Segment.text(50 + i), noise, Segment.text(1)) for i in range(6)],
        [_sample("single", Task.T2V, Segment.text(9), Segment.visual(SegmentKind.NOISE, (3, 12, 14)), Segment.text(1))],
        [_sample("short", Task.T2T, Segment.text(5), answer=1)],
    ]


def _filled(samples: Sequence[Sample]) -> FilledPack:
    sizes = {"hidden": MODEL.hidden_size, "channels": MODEL.latent_channels, "vocabulary": TOKENIZER_SIZE}
    return FilledPack.random(Pack(tuple(samples), CAPACITY), **sizes, seed=1)


def global_batches() -> dict[str, list[FilledPack]]:
    """The two global batches of four packs that every layout trains on, in this order."""
    return {
        "all tasks": [_filled(samples) for samples in all_tasks()],
        "scarce": [_filled(samples) for samples in _scarce()],
    }


@dataclass(frozen=True)
class StepResult:
    """One step.

    Attributes:
        loss: of the global batch.
        grad_norm: over all parameters.
        by_task: loss of each task.
        gradients: by public key; empty where a distributed optimizer keeps them in shards.
        weights: after the update, by public key.
    """

    loss: float
    grad_norm: float
    by_task: Mapping[str, float]
    gradients: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]


def parameter_group(key: str) -> str:
    """The group a public key belongs to: expert and part of a layer, or the module outside the layers."""
    parts = key.removeprefix("language_model.").removeprefix("model.").split(".")
    if parts[0] != "layers":
        return parts[0]
    expert = "gen" if "_moe_gen" in key else "und"
    part = parts[2].removesuffix("_moe_gen")
    return f"{expert} {part if part in ('self_attn', 'mlp') else 'norms'}"


def relative_by_group(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Largest relative difference of each parameter group: max |ours - theirs| / max |theirs|, tensor by tensor.

    A tensor whose largest value is below a thousandth of its group's is compared on that scale: it is a sum of
    cancelling terms (a key bias shifts all scores of a query alike, so its gradient is rounding).
    """
    scale: dict[str, float] = {}
    for key, want in theirs.items():
        group = parameter_group(key)
        scale[group] = max(scale.get(group, 0.0), float(want.abs().max()))
    found: dict[str, float] = {}
    for key, want in theirs.items():
        group = parameter_group(key)
        if key not in ours or ours[key].shape != want.shape:
            found[group] = float("inf")
            continue
        floor = max(float(want.abs().max()), 1e-3 * scale[group], torch.finfo(torch.float32).tiny)
        difference = float((ours[key].double() - want.double()).abs().max()) / floor
        found[group] = max(found.get(group, 0.0), _number(difference))
    return found


def differences(ours: Iterable[StepResult], theirs: Iterable[StepResult]) -> dict[str, float]:
    """Largest relative difference over the steps of loss, gradient norm, weights, and each group's gradients."""
    found: dict[str, float] = {}
    for a, b in zip(ours, theirs, strict=True):
        step = {"loss": abs(a.loss - b.loss) / abs(b.loss), "grad norm": abs(a.grad_norm - b.grad_norm) / b.grad_norm}
        missing = float("nan")
        by_task = [(a.by_task.get(t, missing), b.by_task.get(t, missing)) for t in {*a.by_task, *b.by_task}]
        step["loss by task"] = max((_number(abs(x - y) / abs(y)) for x, y in by_task), default=0.0)
        step["weights"] = max(relative_by_group(a.weights, b.weights).values(), default=0.0)
        if a.gradients:
            step |= relative_by_group(a.gradients, b.gradients)
        for name, value in step.items():
            found[name] = max(found.get(name, 0.0), _number(value))
    return found


def _number(difference: float) -> float:
    """A difference that is no number is larger than any."""
    return math.inf if math.isnan(difference) else difference
