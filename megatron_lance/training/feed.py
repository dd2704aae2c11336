"""What a step trains on: from a step number to this rank's micro-batches.

Station: pack index -> decode -> encoders -> noising -> [dispatch] -> step.  The packs of a global batch are fixed by
the step number alone; degrees only decide which replica gets which of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_lance.config.schema import RunConfig
from megatron_lance.data.decode import MediaDecoder
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex, PlannedPack
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.encoders.replica import ReplicaEncoder
from megatron_lance.encoders.vae import build_vae
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.model.transformer_config import DTYPES
from megatron_lance.objectives.flow_matching import draw_noise
from megatron_lance.objectives.losses import LossCounts
from megatron_lance.packing.batch import PackVisuals
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.packer import deal_packs
from megatron_lance.packing.positions import Mape
from megatron_lance.parallel.dispatch import RankBatch, rank_batch
from megatron_lance.parallel.groups import Groups


@dataclass(frozen=True)
class StepInputs:
    """One step as one rank sees it.

    Attributes:
        batches: this replica's micro-batches, on this rank's device.
        counts: loss rows of the whole global batch.
        packs: numbers of all packs of the global batch.
        tokens: real tokens of the global batch.
        capacity: tokens its packs could hold.
        broken: visual segments of this replica's packs that could not be read.
    """

    batches: Sequence[RankBatch]
    counts: LossCounts
    packs: Sequence[int]
    tokens: int
    capacity: int
    broken: int


class Feed:
    """Reads, encodes and dispatches the packs of a run.

    Args:
        run: the whole configuration.
        groups: degrees and ranks.
        tokenizer: of the run.

    Raises:
        PackIndexError: if the index is missing or was made for another configuration.
    """

    def __init__(self, run: RunConfig, groups: Groups, tokenizer: Tokenizer) -> None:
        self.run, self.groups = run, groups
        seed = run.training.seed
        self.index = PackIndex.open(run.data.pack_index)
        self.reader = PackReader(run.data, self.index, tokenizer, seed, run.model)
        device_id = groups.device.index if groups.device.type == "cuda" else None
        self.encoder = ReplicaEncoder(
            MediaDecoder(run.data.decode, run.data.decode_threads, device_id),
            VitEncoder.build(run.encoders, run.model.hidden_size, seed).to(groups.device),
            build_vae(run.encoders, run.model.latent_channels, seed).to(groups.device),
            groups.replica,
            hidden_size=run.model.hidden_size,
            latent_channels=run.model.latent_channels,
            seed=seed,
        )

    def step(self, step: int) -> StepInputs:
        """The inputs of a step, counted from 0; a collective of the replica."""
        numbers = self.index.global_batch(step, self.run.training.global_batch_size)
        planned = [self.index.pack(n) for n in numbers]
        mine = deal_packs([p.mask_pairs for p in planned], self.groups.dp)[self.groups.dp_rank]
        packs = [planned[i] for i in mine]
        visuals = self.encoder.encode(packs, self.reader)
        return StepInputs(
            batches=[self._batch(*pair) for pair in zip(packs, visuals, strict=True)],
            counts=LossCounts.of(p.pack for p in planned),
            packs=numbers,
            tokens=sum(p.pack.length for p in planned),
            capacity=sum(p.pack.capacity for p in planned),
            broken=sum(int((~v.valid).sum()) for v in visuals),
        )

    def _batch(self, planned: PlannedPack, visuals: PackVisuals) -> RankBatch:
        """One pack as this rank sees it, on its device."""
        run, groups = self.run, self.groups
        noise = draw_noise(
            planned.pack,
            planned.epochs,
            run.model.latent_channels,
            seed=run.training.seed,
            shift=run.objective.timestep_shift,
            distribution=run.objective.timestep_distribution,
        )
        batch = rank_batch(
            planned.pack,
            Layout.build(planned.pack, groups.cp, groups.tp, run.parallel.region_alignment),
            self.reader.tokens(planned.number),
            visuals,
            noise,
            mape=Mape(run.model.mape),
            mape_step=run.model.mape_step,
            cp_rank=groups.cp_rank,
            tp_rank=groups.tp_rank,
        )
        return batch.to(groups.device, DTYPES[run.training.precision])
