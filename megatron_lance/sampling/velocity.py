"""The model as a velocity function, with the clean context's keys and values computed once.

Station: Euler sampler -> [requests as one pack -> model passes] -> Euler sampler.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_lance.model.joint_attention import KeyValueCache
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import SegmentKind
from megatron_lance.sampling.flow_sampler import Request
from megatron_lance.sampling.passes import ModelPasses, Part, PassInputs, pack_of


def context_and_target(pack: Pack) -> tuple[Part, Part]:
    """The tokens before each sample's noise segment, and those of the noise segments; bool [L] each."""
    context, target = np.zeros(pack.length, dtype=bool), np.zeros(pack.length, dtype=bool)
    starts = pack.sample_starts
    for placed in pack.visual_segments(SegmentKind.NOISE):
        context[starts[placed.sample_index] : placed.start] = True
        target[placed.start : placed.stop] = True
    return context, target


class ModelVelocity:
    """Velocity of packed requests; a collective of the replica.

    Requests that begin the list of the call before (as the conditional branch does when guidance ends) use its cache.

    Args:
        passes: runs the model.
        cached: keep the context's keys and values between calls; else every call computes all tokens.
    """

    def __init__(self, passes: ModelPasses, cached: bool = True) -> None:
        self.passes, self.cached = passes, cached
        self.mape = Mape(passes.model.mape)
        self.known: list[Request]
        self.cache: KeyValueCache
        self.forget()

    def forget(self) -> None:
        """Drop the cache: the weights have changed, or its memory is wanted."""
        self.known, self.cache = [], KeyValueCache(0)

    def __call__(self, requests: Sequence[Request], xs: Sequence[torch.Tensor], t: float) -> list[torch.Tensor]:
        """Velocity of each request's VAE rows at time t.

        Args:
            requests: packed together.
            xs: x of each request's VAE rows, float32 [N_vae, C].
            t: time of the rows to generate; other rows are at 0.

        Returns:
            float32 [N_vae, C] each, on the CPU; with the cache, rows before the noise segment are zero.
        """
        inputs = PassInputs(
            pack=pack_of([r.sample for r in requests]),
            token_ids=torch.cat([r.token_ids for r in requests]),
            vit=torch.cat([r.vit for r in requests]),
            x=torch.cat(list(xs)),
            timesteps=torch.cat([r.target_rows for r in requests]).float() * t,
            logit_rows=torch.zeros(0, dtype=torch.int64),
        )
        if self.cached:
            context, target = context_and_target(inputs.pack)
            if len(requests) > len(self.known) or any(a is not b for a, b in zip(requests, self.known, strict=False)):
                self.known, self.cache = list(requests), KeyValueCache(inputs.pack.length)
                self.passes.fill(inputs, self.mape, context, self.cache)
            rows = self.passes.velocity(inputs, self.mape, target, self.cache.first(inputs.pack.length))
        else:
            rows = self.passes.velocity(inputs, self.mape)
        return list(rows.split([len(x) for x in xs]))
