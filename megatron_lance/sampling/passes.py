"""The model on packed samples, on any layout: whole packs, or part by part with a cache of keys and values.

Station: samplers -> [pack -> dispatch -> stages] -> samplers.  Stages run by megatron-core's forward-only schedule.  A
part is some tokens of a pack: they get rows, and attend to the keys and values that earlier parts have left in the
cache.  No clean token sees a noise token, and no token a later one, so a context's keys and values are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_lance.config.schema import ModelConfig
from megatron_lance.model.heads import HeadOutputs
from megatron_lance.model.joint_attention import KeyValueCache
from megatron_lance.model.lance_model import LanceModel
from megatron_lance.packing.batch import PackNoise, PackTokens, PackVisuals
from megatron_lance.packing.layout import PADDING, Layout, token_experts
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Pack, Sample
from megatron_lance.packing.segment import Expert
from megatron_lance.parallel.dispatch import RankBatch, rank_batch
from megatron_lance.parallel.groups import Groups

Part = npt.NDArray[np.bool_]
"""Bool [L]: tokens of a pack."""


@dataclass(frozen=True)
class PassInputs:
    """A pack's values in one pass, pack order.

    Attributes:
        pack: the structure.
        token_ids: int64 [L].
        vit: [N_vit, hidden], ViT output.
        x: float32 [N_vae, C], latents as they stand.
        timesteps: float32 [N_vae].
        logit_rows: int64 [n], tokens whose logits are wanted.
    """

    pack: Pack
    token_ids: torch.Tensor
    vit: torch.Tensor
    x: torch.Tensor
    timesteps: torch.Tensor
    logit_rows: torch.Tensor


def pack_of(samples: Sequence[Sample]) -> Pack:
    """Samples as one pack that is exactly full."""
    return Pack(tuple(samples), sum(sample.length for sample in samples))


def _forward_step(batches: Iterator[RankBatch], model: Any, *, cache: KeyValueCache | None) -> tuple[Any, Any]:
    return model(next(batches), cache), lambda output, non_loss_data: output


class ModelPasses:
    """Runs the model without gradients; every call is a collective of the replica.

    Attributes:
        before: called before each pass, for who wants to know that there is progress.

    Args:
        stages: the model chunks of this pipeline rank.
        model: sizes and MaPE.
        groups: degrees and ranks.
        alignment: rows; as in training.
    """

    def __init__(self, stages: Sequence[LanceModel], model: ModelConfig, groups: Groups, alignment: int) -> None:
        self.stages, self.model, self.groups, self.alignment = list(stages), model, groups, alignment
        self.dtype = stages[0].config.params_dtype
        self.before: Callable[[], None] | None = None

    @torch.no_grad()
    def _run(
        self, inputs: PassInputs, mape: Mape, part: Part | None, cache: KeyValueCache | None
    ) -> tuple[Layout, RankBatch, HeadOutputs | None]:
        """One pass; the heads' outputs are on the last stage only."""
        if self.before is not None:
            self.before()
        groups, pack = self.groups, inputs.pack
        layout = Layout.build(pack, groups.cp, groups.tp, self.alignment, part)
        x, visuals = inputs.x, sum(1 for placed in pack.placed_segments() if placed.segment.is_visual)
        batch = rank_batch(
            pack,
            layout,
            PackTokens(inputs.token_ids, inputs.logit_rows, torch.zeros_like(inputs.logit_rows)),
            PackVisuals(vit=inputs.vit, latents=x, valid=torch.ones(visuals, dtype=torch.bool)),
            PackNoise(inputs.timesteps, torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool), x_t=x),
            mape=mape,
            mape_step=self.model.mape_step,
            cp_rank=groups.cp_rank,
            tp_rank=groups.tp_rank,
        ).to(groups.device, self.dtype)
        for stage in self.stages:
            stage.eval()
        copies = groups.pp if len(self.stages) > 1 else 1  # the interleaved schedule needs one batch per stage
        stored = get_forward_backward_func()(
            forward_step_func=partial(_forward_step, cache=cache),
            data_iterator=[iter([batch] * copies) for _ in self.stages],
            model=self.stages,
            num_microbatches=copies,
            seq_length=layout.rows * groups.cp,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        for stage in self.stages:
            stage.train()
        return layout, batch, stored[0] if stored else None

    def fill(self, inputs: PassInputs, mape: Mape, part: Part, cache: KeyValueCache) -> None:
        """Compute the keys and values of a part into the cache."""
        self._run(inputs, mape, part, cache)

    def velocity(
        self, inputs: PassInputs, mape: Mape, part: Part | None = None, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """Velocity of every VAE row, float32 [N_vae, C] on the CPU of every rank; zeros outside the part."""
        layout, _, outputs = self._run(inputs, mape, part, cache)
        rows = torch.zeros_like(inputs.x, device=self.groups.device)
        if outputs is not None:
            shard = layout.shard_tokens(Expert.GEN, self.groups.cp_rank, self.groups.tp_rank)
            order = token_experts(inputs.pack).cumsum() - 1  # pack-order token -> VAE row
            held = torch.from_numpy(shard != PADDING)
            rows[torch.from_numpy(order[shard[shard != PADDING]])] = outputs.velocity[held].float()
        dist.all_reduce(rows, group=self.groups.replica)
        return rows.cpu()

    def logits(
        self, inputs: PassInputs, mape: Mape, part: Part | None = None, cache: KeyValueCache | None = None
    ) -> torch.Tensor:
        """Logits of `inputs.logit_rows`, float32 [n, vocab], on every rank; -inf for ids outside the tokenizer."""
        layout, batch, outputs = self._run(inputs, mape, part, cache)
        found = torch.zeros(len(inputs.logit_rows), self.model.vocab_size, device=self.groups.device)
        if outputs is not None and bool((batch.ce_weights > 0).any()):
            region = layout.region_tokens(Expert.UND, self.groups.cp_rank)
            tokens = torch.from_numpy(region)[batch.ce_rows.cpu()]
            places = torch.searchsorted(inputs.logit_rows, tokens).to(found.device)
            shard = self.model.vocab_size // self.groups.tp
            start = self.groups.tp_rank * shard
            found[places, start : start + shard] = outputs.logits.float()
        dist.all_reduce(found, group=self.groups.replica)
        return found
