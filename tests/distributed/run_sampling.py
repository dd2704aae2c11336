"""Sample every task on several layouts of two ranks, with and without the cache, and print how far results differ.

The first layout is two replicas of one rank each, which is what the others are compared with.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_lance.checkpoint.hf_lance import RandomSource, load_weights
from megatron_lance.config.schema import ParallelConfig
from megatron_lance.model.lance_model import build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.objectives.random_values import FilledPack
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Pack, Sample
from megatron_lance.packing.segment import SegmentKind
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parity.equivalence import MODEL, TOKENIZER_SIZE, global_batches
from megatron_lance.sampling.flow_sampler import Request, SamplerSettings, initial_noise, sample
from megatron_lance.sampling.passes import ModelPasses
from megatron_lance.sampling.text_decoder import DecoderSettings, Question, decode
from megatron_lance.sampling.velocity import ModelVelocity

LAYOUTS = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "pp2-vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}
SETTINGS = SamplerSettings(steps=3, shift=2.0, scale=3.0, visual_scale=1.5, interval=(0.3, 1.0))
END = 3


def samples() -> list[Sample]:
    """Samples of every task; captions are the ten tokens before the last visual block."""
    found = [sample for filled in global_batches()["all tasks"] for sample in filled.pack.samples]
    with_captions = []
    for shape in found:
        before = 0
        for segment in shape.segments:
            if segment.kind is SegmentKind.NOISE:
                break
            before += segment.length
        caption = (before - 11, before - 1) if shape.task.is_generation else None
        with_captions.append(replace(shape, caption_span=caption))
    return with_captions


def filled(shape: Sample) -> FilledPack:
    sizes = {"hidden": MODEL.hidden_size, "channels": MODEL.latent_channels, "vocabulary": TOKENIZER_SIZE}
    return FilledPack.random(Pack((shape,), shape.length), seed=5, **sizes)


def request(shape: Sample) -> Request:
    values = filled(shape)
    return Request(shape, values.tokens.token_ids, values.visuals.latents, values.visuals.vit)


def question(shape: Sample) -> Question:
    """Everything but the answer."""
    values, start = filled(shape), shape.label_spans[0][0]
    tail = replace(shape.segments[-1], length=shape.segments[-1].length - (shape.length - start))
    without = replace(shape, segments=(*shape.segments[:-1], tail), label_spans=())
    return Question(without, values.tokens.token_ids[:start], values.visuals.vit)


def run_layout(cached: bool, parallel: ParallelConfig) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Latents of every generation sample and answers of every question."""
    groups = parallel_groups.initialize(parallel, seed=1)
    stages = build_stages(transformer_config(MODEL, parallel, "float32"), MODEL, TOKENIZER_SIZE)
    load_weights(stages, RandomSource(1, MODEL), MODEL, tp_rank=groups.tp_rank, tp=groups.tp)
    with torch.no_grad():
        for stage in stages:
            for parameter in stage.parameters():
                parameter.mul_(1.5)  # attention matters more than at initialisation
    passes = ModelPasses(stages, MODEL, groups, 4)
    velocity = ModelVelocity(passes, cached)
    requests = [request(s) for s in samples() if s.task.is_generation]
    noise = initial_noise(requests, MODEL.latent_channels, 7)
    latents = sample(requests, noise, velocity, SETTINGS)
    questions = [question(s) for s in samples() if not s.task.is_generation]
    answers: dict[str, list[int]] = {}
    for name, settings in {"greedy": DecoderSettings(6), "top-p": DecoderSettings(6, top_p=0.9)}.items():
        found = decode(questions, [2] * len(questions), passes, settings, END, Mape.RELEASE, cached)
        answers |= {f"{q.sample.sample_id} {name}": ids for q, ids in zip(questions, found, strict=True)}
    parallel_groups.leave()
    return {r.sample.sample_id: x for r, x in zip(requests, latents, strict=True)}, answers


def main() -> None:
    """Run."""
    reference, answers = run_layout(False, ParallelConfig(region_alignment=4))
    results = {}
    for name, degrees in LAYOUTS.items():
        latents, found = run_layout(True, ParallelConfig(region_alignment=4, **degrees))  # type: ignore[arg-type]
        results[name] = {
            "latents": {
                key: float((x - reference[key]).abs().max() / reference[key].abs().max()) for key, x in latents.items()
            },
            "answers": found,
        }
    if dist.get_rank() == 0:
        sys.stdout.write(f"RESULTS {json.dumps({'answers': answers, 'layouts': results})}\n")
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
