"""Euler sampling with classifier-free guidance (spec/model.md section 7).

Station: prompts -> [x from noise to data] -> VAE decoder.  The sampler knows samples, rows and velocities; what
computes a velocity is handed in, so the same sampler serves any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_lance.config.errors import UserError
from megatron_lance.objectives.flow_matching import loss_rows, shift_timestep
from megatron_lance.packing.rng import stream
from megatron_lance.packing.sample import Pack, Sample
from megatron_lance.packing.segment import VAE_KINDS, Segment, SegmentKind


@dataclass(frozen=True)
class Request:
    """One sample to generate.

    Attributes:
        sample: its structure, one noise segment.
        token_ids: int64 [length].
        clean: float32 [N_vae, C], latents of clean segments and frame conditions; rows to generate are ignored.
        vit: [N_vit, hidden], ViT output of the condition's ViT segments.
    """

    sample: Sample
    token_ids: torch.Tensor
    clean: torch.Tensor
    vit: torch.Tensor

    @property
    def target_rows(self) -> torch.Tensor:
        """Bool [N_vae]: rows to generate."""
        return loss_rows(Pack((self.sample,), self.sample.length))

    @property
    def target_grid(self) -> tuple[int, int, int]:
        """Grid (T, H, W) of the noise segment."""
        noise = [s.grid for s in self.sample.segments if s.kind is SegmentKind.NOISE]
        if len(noise) != 1 or noise[0] is None:
            raise ValueError(f"sample {self.sample.sample_id}: has {len(noise)} noise segments; a request has one")
        return noise[0]


Velocity = Callable[[Sequence[Request], Sequence[torch.Tensor], float], list[torch.Tensor]]
"""(requests, x of each [N_vae, C], t) -> velocity of each [N_vae, C]."""


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample; defaults of the release.

    Attributes:
        steps: Euler steps.
        shift: timestep shift.
        scale: guidance scale on text; 1 turns guidance off.
        visual_scale: guidance scale on the visual conditions of edits and references, with a branch that has neither
            text nor conditions; 1 leaves that branch out.
        interval: guidance is on for t in (low, high].
        renorm: global (over all target rows of a sample) | channel (per row) | none.
        renorm_min: least factor that the renorm scales by.

    Raises:
        UserError: naming the setting that is out of its range.
    """

    steps: int = 30
    shift: float = 3.5
    scale: float = 4.0
    visual_scale: float = 1.0
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps {self.steps}: must be at least 1; raise it")
        if not self.shift > 0:
            raise UserError(f"shift {self.shift}: must be positive; 1 shifts nothing")
        if not self.interval[0] < self.interval[1]:
            raise UserError(f"interval {self.interval}: its low end must lie below its high end; exchange them")
        if self.renorm not in ("global", "channel", "none"):
            raise UserError(f"renorm {self.renorm!r}: choose global, channel or none")


def timesteps(steps: int, shift: float) -> torch.Tensor:
    """The shifted times from 1 (noise) to 0 (data): float32 [steps + 1]."""
    return shift_timestep(torch.linspace(1, 0, steps + 1), shift)


def without_caption(request: Request) -> Request:
    """The unconditional branch: the same sequence without its caption tokens; positions follow from the structure."""
    sample = request.sample
    if sample.caption_span is None or sample.caption_span[0] == sample.caption_span[1]:
        return request
    start, stop = sample.caption_span
    segments, at = [], 0
    for segment in sample.segments:
        inside = min(stop, at + segment.length) - max(start, at)
        if inside > 0 and segment.kind is not SegmentKind.TEXT:
            raise ValueError(f"sample {sample.sample_id}: its caption [{start}, {stop}) reaches into a visual segment")
        left = segment.length - max(inside, 0)
        if left == segment.length:
            segments.append(segment)
        elif left > 0:
            segments.append(Segment.text(left))
        at += segment.length
    kept = torch.cat([request.token_ids[:start], request.token_ids[stop:]])
    return replace(request, sample=replace(sample, segments=tuple(segments), caption_span=None), token_ids=kept)


def without_conditions(request: Request) -> Request:
    """The branch without visual conditions: their ViT and clean blocks are left out."""
    kept = [s for s in request.sample.segments if s.kind in (SegmentKind.TEXT, SegmentKind.NOISE)]
    if len(kept) == len(request.sample.segments):
        return request
    ids, at = [], 0
    for segment in request.sample.segments:
        if segment in kept:
            ids.append(request.token_ids[at : at + segment.length])
        at += segment.length
    shape = replace(request.sample, segments=tuple(kept))
    return Request(shape, torch.cat(ids), request.clean[_noise_rows(request)], request.vit[:0])


def _guided(branches: Sequence[torch.Tensor], settings: SamplerSettings) -> torch.Tensor:
    """Guided velocity of a sample's target rows [n, C], scaled back to the conditional one's norm.

    Args:
        branches: conditional, without caption, and without caption and conditions if that is computed.
        settings: scales and renorm.
    """
    conditional, plain = branches[:2]
    bare = branches[2] if len(branches) > 2 else plain
    v = bare + settings.scale * (conditional - plain) + settings.visual_scale * (plain - bare)
    if settings.renorm == "none":
        return v
    dim = None if settings.renorm == "global" else -1
    norms = [torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (conditional, v)]
    return v * (norms[0] / (norms[1] + 1e-8)).clamp(settings.renorm_min, 1.0)


def initial_noise(requests: Sequence[Request], channels: int, seed: int) -> list[torch.Tensor]:
    """Noise of each request [N_vae, C], a function of (seed, sample id)."""
    noises = []
    for request in requests:
        rows = sum(s.content_length for s in request.sample.segments if s.kind in VAE_KINDS)
        values = stream(seed, "sampling noise", request.sample.sample_id).standard_normal((rows, channels))
        noises.append(torch.from_numpy(values).float())
    return noises


@torch.no_grad()
def sample(
    requests: Sequence[Request], noise: Sequence[torch.Tensor], velocity: Velocity, settings: SamplerSettings
) -> list[torch.Tensor]:
    """Generate.

    Args:
        requests: what to generate; all in one call of `velocity` per branch and step.
        noise: [N_vae, C] of each, x at t = 1.
        velocity: the model.
        settings: steps, shift, guidance.

    Returns:
        Latents of each request's noise segment, float32 [T, H, W, C].
    """
    masks = [request.target_rows for request in requests]
    xs = [torch.where(m[:, None], n, r.clean) for m, n, r in zip(masks, noise, requests, strict=True)]
    guidance = settings.scale != 1.0 or settings.visual_scale != 1.0
    branches = [_branches(request, settings) for request in requests]
    # conditional ones first, so that they alone are the beginning of the list
    together = [(i, own[n]) for n in range(3) for i, own in enumerate(branches) if n < len(own)]
    times = timesteps(settings.steps, settings.shift)
    low, high = settings.interval
    inside = ((times > low) & (times <= high)).tolist()  # in float32, as the times are: 0.4 is not above 0.4
    for now, after, guided in zip(times[:-1].tolist(), times[1:].tolist(), inside[:-1], strict=True):
        if guidance and guided:
            inputs = [_rows_for(branch, requests[i], xs[i]) for i, branch in together]
            results = velocity([branch for _, branch in together], inputs, now)
            targets: list[list[torch.Tensor]] = [[] for _ in requests]
            for (i, branch), v in zip(together, results, strict=True):
                targets[i].append(v[branch.target_rows])
            steps = [_guided(own, settings) for own in targets]
        else:
            steps = [v[m] for v, m in zip(velocity(requests, xs, now), masks, strict=True)]
        for x, mask, v in zip(xs, masks, steps, strict=True):
            x[mask] -= v * (now - after)
    return [_target(request, x) for request, x in zip(requests, xs, strict=True)]


def _branches(request: Request, settings: SamplerSettings) -> list[Request]:
    """Conditional, without caption, and if visual guidance is on and there are conditions without both."""
    plain = without_caption(request)
    bare = plain if settings.visual_scale == 1.0 else without_conditions(plain)
    return [request, plain] if bare is plain else [request, plain, bare]


def _noise_rows(request: Request) -> slice:
    """VAE rows of the noise segment."""
    at = 0
    for segment in request.sample.segments:
        if segment.kind is SegmentKind.NOISE:
            return slice(at, at + segment.content_length)
        at += segment.gen_length
    raise ValueError(f"sample {request.sample.sample_id}: has no noise segment")


def _rows_for(branch: Request, request: Request, x: torch.Tensor) -> torch.Tensor:
    """The request's x as a branch sees it: all rows, or the noise segment's where the conditions are left out."""
    return x if len(branch.clean) == len(request.clean) else x[_noise_rows(request)]


def _target(request: Request, x: torch.Tensor) -> torch.Tensor:
    """Rows of the noise segment [N_vae, C] -> [T, H, W, C]."""
    return x[_noise_rows(request)].reshape(*request.target_grid, -1)
