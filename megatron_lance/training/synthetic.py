"""Micro-batches of packs whose values are at hand, without data set and feed.

Station: filled packs -> [dispatch to this rank] -> step; for checks and profiles.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.schema import RunConfig
from megatron_lance.model.transformer_config import DTYPES
from megatron_lance.objectives.random_values import FilledPack
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.packer import deal_packs, mask_pairs
from megatron_lance.packing.positions import Mape
from megatron_lance.parallel.dispatch import RankBatch, rank_batch
from megatron_lance.parallel.groups import Groups


def micro_batches(packs: Sequence[FilledPack], run: RunConfig, groups: Groups) -> list[RankBatch]:
    """This replica's packs as this rank sees them, on its device.

    Args:
        packs: the global batch, the same on every rank.
        run: the whole configuration.
        groups: degrees and ranks.
    """
    costs = [sum(mask_pairs(sample.segments) for sample in filled.pack.samples) for filled in packs]
    return [
        rank_batch(
            packs[i].pack,
            Layout.build(packs[i].pack, groups.cp, groups.tp, row_alignment(run)),
            packs[i].tokens,
            packs[i].visuals,
            packs[i].noise,
            mape=Mape(run.model.mape),
            mape_step=run.model.mape_step,
            cp_rank=groups.cp_rank,
            tp_rank=groups.tp_rank,
        ).to(groups.device, DTYPES[run.training.precision])
        for i in deal_packs(costs, groups.dp)[groups.dp_rank]
    ]
