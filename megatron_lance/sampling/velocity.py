"""The model as a velocity function, on any layout.

Station: sampler -> [pack -> dispatch -> stages -> rows of all ranks] -> sampler.  All requests of a call become one
pack; stages run by megatron-core's forward-only schedule, and every rank of the replica gets all velocities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_lance.config.schema import ModelConfig
from megatron_lance.model.heads import HeadOutputs
from megatron_lance.model.lance_model import LanceModel
from megatron_lance.packing.batch import PackNoise, PackTokens, PackVisuals
from megatron_lance.packing.layout import PADDING, Layout, token_experts
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Pack
from megatron_lance.packing.segment import Expert
from megatron_lance.parallel.dispatch import RankBatch, rank_batch
from megatron_lance.parallel.groups import Groups
from megatron_lance.sampling.flow_sampler import Request


def _forward_step(batches: Iterator[RankBatch], model: Any) -> tuple[Any, Any]:
    return model(next(batches)), lambda output, non_loss_data: output


class ModelVelocity:
    """Calls the model for the velocity of packed requests.

    Args:
        stages: the model chunks of this pipeline rank.
        model: sizes and MaPE.
        groups: degrees and ranks.
        alignment: rows; as in training.
    """

    def __init__(self, stages: Sequence[LanceModel], model: ModelConfig, groups: Groups, alignment: int) -> None:
        self.stages, self.model, self.groups, self.alignment = list(stages), model, groups, alignment
        self.dtype = stages[0].config.params_dtype

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request], xs: Sequence[torch.Tensor], t: float) -> list[torch.Tensor]:
        """Velocity of each request's VAE rows at time t; a collective of the replica.

        Args:
            requests: packed together.
            xs: x of each request's VAE rows, float32 [N_vae, C].
            t: time of the rows to generate; other rows are at 0.

        Returns:
            float32 [N_vae, C] each, on the CPU.
        """
        pack = Pack(tuple(r.sample for r in requests), sum(r.sample.length for r in requests))
        layout = Layout.build(pack, self.groups.cp, self.groups.tp, self.alignment)
        x = torch.cat(list(xs))
        mask = torch.cat([r.target_rows for r in requests])
        batch = rank_batch(
            pack,
            layout,
            PackTokens.from_ids(pack, torch.cat([r.token_ids for r in requests])),
            PackVisuals(
                vit=x.new_zeros(0, self.model.hidden_size),
                latents=x,
                valid=torch.ones(_visuals(pack), dtype=torch.bool),
            ),
            PackNoise(mask.float() * t, torch.zeros_like(x), mask, x_t=x),
            mape=Mape(self.model.mape),
            mape_step=self.model.mape_step,
            cp_rank=self.groups.cp_rank,
            tp_rank=self.groups.tp_rank,
        ).to(self.groups.device, self.dtype)
        outputs = self._run(batch, layout)
        rows = self._gather(outputs, layout, pack, x)
        return list(rows.split([len(x) for x in xs]))

    def _run(self, batch: RankBatch, layout: Layout) -> HeadOutputs | None:
        """The heads' outputs on the last stage, None elsewhere."""
        for stage in self.stages:
            stage.eval()
        copies = self.groups.pp if len(self.stages) > 1 else 1  # the interleaved schedule needs one batch per stage
        stored = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter([batch] * copies) for _ in self.stages],
            model=self.stages,
            num_microbatches=copies,
            seq_length=layout.rows * self.groups.cp,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        for stage in self.stages:
            stage.train()
        return stored[0] if stored else None

    def _gather(self, outputs: HeadOutputs | None, layout: Layout, pack: Pack, x: torch.Tensor) -> torch.Tensor:
        """Velocity rows of all shards, on every rank of the replica, in pack order: float32 [N_vae, C]."""
        rows = torch.zeros_like(x, device=self.groups.device)
        if outputs is not None:
            shard = layout.shard_tokens(Expert.GEN, self.groups.cp_rank, self.groups.tp_rank)
            order = token_experts(pack).cumsum() - 1  # pack-order token -> VAE row
            held = torch.from_numpy(shard != PADDING)
            rows[torch.from_numpy(order[shard[shard != PADDING]])] = outputs.velocity[held].float()
        dist.all_reduce(rows, group=self.groups.replica)
        return rows.cpu()


def _visuals(pack: Pack) -> int:
    return sum(1 for placed in pack.placed_segments() if placed.segment.is_visual)
