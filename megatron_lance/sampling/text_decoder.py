"""Answers token by token: greedy or top-p, with a cache (spec/model.md section 7).

Station: questions -> [context pass, one pass per token] -> token ids.  All questions of a call are one pack in which
each has room for its longest answer; a pass gives rows to the newest token of every question that still goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_lance.config.errors import UserError
from megatron_lance.model.joint_attention import KeyValueCache
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.rng import uniform
from megatron_lance.packing.sample import Sample
from megatron_lance.packing.segment import Segment
from megatron_lance.sampling.passes import ModelPasses, PassInputs, pack_of


@dataclass(frozen=True)
class Question:
    """Everything before an answer.

    Attributes:
        sample: its structure; ends with text, no noise segment.
        token_ids: int64 [length].
        vit: [N_vit, hidden], ViT output.
    """

    sample: Sample
    token_ids: torch.Tensor
    vit: torch.Tensor


@dataclass(frozen=True)
class DecoderSettings:
    """How to choose tokens.

    Attributes:
        max_tokens: of an answer.
        top_p: smallest probability mass of the likeliest tokens that are drawn from; 0 takes the likeliest (greedy).
        temperature: divides logits before top-p.
    """

    max_tokens: int = 256
    top_p: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens}: must be at least 1; raise it")
        if not 0.0 <= self.top_p <= 1.0:
            raise UserError(f"top_p {self.top_p}: must lie in [0, 1]; 0 is greedy")
        if not self.temperature > 0.0:
            raise UserError(f"temperature {self.temperature}: must be positive; top_p=0 is greedy")


def choose(logits: torch.Tensor, settings: DecoderSettings, seed: int, sample_id: str, number: int) -> int:
    """The next token; a draw is addressed by the last three arguments.

    Args:
        logits: float32 [vocab].
        settings: greedy or top-p.
        seed: of the question.
        sample_id: of the question.
        number: of the token in its answer, from 0.
    """
    if settings.top_p == 0.0:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits.double() / settings.temperature, dim=-1).sort(
        descending=True, stable=True
    )
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities * (before < settings.top_p)
    point = uniform(seed, "answer", sample_id, number) * float(kept.sum())
    place = int(torch.searchsorted(kept.cumsum(-1), point, right=True))
    return int(ids[min(place, int((kept > 0).sum()) - 1)])


def _with_room(question: Question, room: int) -> Question:
    """The question with `room` more text tokens, whose ids are set later."""
    sample = question.sample
    segments = (*sample.segments, Segment.text(room))
    ids = torch.cat([question.token_ids, torch.zeros(room, dtype=torch.int64)])
    return replace(question, sample=replace(sample, segments=segments, label_spans=()), token_ids=ids)


def decode(
    questions: Sequence[Question],
    seeds: Sequence[int],
    passes: ModelPasses,
    settings: DecoderSettings,
    end: int,
    mape: Mape,
    cached: bool = True,
) -> list[list[int]]:
    """Answer all questions; a collective of the replica.

    Args:
        questions: packed together.
        seeds: of each question's draws.
        passes: runs the model.
        settings: how to choose tokens.
        end: token id that ends an answer; it is not part of it.
        mape: the positions' rule; the release's own text inference takes none (spec/model.md section 7).
        cached: keep keys and values; else every pass computes all tokens, which is slower and the same.

    Returns:
        Token ids of each answer.
    """
    roomy = [_with_room(question, settings.max_tokens) for question in questions]
    pack = pack_of([question.sample for question in roomy])
    last = [s + q.sample.length - 1 for s, q in zip(pack.sample_starts, questions, strict=True)]
    ids = torch.cat([question.token_ids for question in roomy])
    answers: list[list[int]] = [[] for _ in questions]
    going = list(range(len(questions)))
    cache = KeyValueCache(pack.length) if cached else None
    part = np.zeros(pack.length, dtype=bool)
    for start, at in zip(pack.sample_starts, last, strict=True):
        part[start : at + 1] = True
    for number in range(settings.max_tokens):
        rows = torch.tensor([last[i] for i in going])
        no_latents = torch.zeros(0, passes.model.latent_channels)
        inputs = PassInputs(pack, ids, torch.cat([q.vit for q in questions]), no_latents, torch.zeros(0), rows)
        logits = passes.logits(inputs, mape, part if cached else None, cache)
        chosen = torch.tensor(
            [
                choose(row, settings, seeds[i], questions[i].sample.sample_id, number)
                for i, row in zip(going, logits, strict=True)
            ]
        ).to(logits.device)
        first_rank = dist.get_global_rank(passes.groups.replica, 0)
        dist.broadcast(chosen, src=first_rank, group=passes.groups.replica)
        if cached:
            part = np.zeros(pack.length, dtype=bool)
        still = []
        for i, token in zip(going, chosen.tolist(), strict=True):
            if token != end:
                answers[i].append(token)
                last[i] += 1
                ids[last[i]] = token
                part[last[i]] = True
                still.append(i)
        going = still
        if not going:
            break
    return answers
