"""What a step trains on: from a step number to this rank's micro-batches.

Station: pack index -> decode -> encoders -> noising -> [dispatch] -> step.  The packs of a global batch are fixed by
the step number alone; degrees only decide which replica gets which of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.schema import RunConfig
from megatron_lance.data.background import Ahead, StepReader
from megatron_lance.data.decode import MediaDecoder
from megatron_lance.data.encoding_cache import EncodingCache
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex, PlannedPack
from megatron_lance.data.position import LeftOut, batch_of, batches_before
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.reading import StepRead, TaskReader
from megatron_lance.data.shares import Task, packs_of_replica, rank_tasks
from megatron_lance.encoders.replica import ReplicaEncoder
from megatron_lance.encoders.vae import build_vae
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.model.transformer_config import DTYPES
from megatron_lance.objectives.flow_matching import draw_noise
from megatron_lance.objectives.losses import LossCounts
from megatron_lance.packing.batch import PackTokens, PackVisuals
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.positions import Mape
from megatron_lance.parallel.dispatch import RankBatch, rank_batch
from megatron_lance.parallel.groups import Groups
from megatron_lance.profiling.flops import Work


@dataclass(frozen=True)
class StepInputs:
    """One step as one rank sees it.

    Attributes:
        batches: this replica's micro-batches, on this rank's device.
        counts: loss rows of the whole global batch.
        packs: numbers of all packs of the global batch.
        mine: those of this replica's micro-batches.
        tokens: real tokens of the global batch.
        capacity: tokens its packs could hold.
        work: of the global batch, what costs FLOPs.
        broken: visual segments of this replica's packs that could not be read.
        read_seconds: that this rank waited for what is read ahead.
    """

    batches: Sequence[RankBatch]
    counts: LossCounts
    packs: Sequence[int]
    mine: Sequence[int]
    tokens: int
    capacity: int
    work: Work
    broken: int
    read_seconds: float = 0.0


class Feed:
    """Encodes and dispatches the packs of a run, which are read ahead.

    Attributes:
        ahead: reads the packs of coming steps.
        left_out: global batches that no step trains on.

    Args:
        run: the whole configuration.
        groups: degrees and ranks.
        tokenizer: of the run.

    Raises:
        PackIndexError: if the index is missing or was made for another configuration.
        CacheError: if data.encoding_cache is missing or was made by other encoders.
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
        self._cache = self._open_cache()
        self.left_out: list[LeftOut] = []
        self._dealt = lru_cache(maxsize=run.data.steps_ahead + 2)(self._deal)
        self.ahead = self._read_ahead()

    def _open_cache(self) -> EncodingCache | None:
        """The cache of encodings, made by the run's encoders."""
        folder = self.run.data.encoding_cache
        if not folder:
            return None
        cache = EncodingCache(folder)
        cache.check(self.encoder.encoders.identity(self.run.encoders, self.run.data.decode))
        return cache

    def _read_ahead(self) -> StepReader:
        settings = self.run.data
        return StepReader(
            TaskReader(self.reader, self.encoder.decoder.reader, self._cache),
            self._tasks,
            Ahead(settings.workers, settings.steps_ahead, settings.media_seconds),
            self.encoder.known,
        )

    def leave_out(self, left_out: Sequence[LeftOut]) -> None:
        """Leave out these global batches from now on; what was read ahead is dropped."""
        self.ahead.close()
        self.left_out[:] = left_out
        self._dealt.cache_clear()
        self.ahead = self._read_ahead()

    def step(self, step: int) -> StepInputs:
        """The inputs of a step, counted from 0; a collective of the replica."""
        start = time.perf_counter()
        read = self.ahead.step(step)
        waited = time.perf_counter() - start
        return replace(self._inputs(*self._dealt(step), read), read_seconds=waited)

    def of_packs(self, planned: Sequence[PlannedPack], reader: PackReader, idle: int = 0) -> StepInputs:
        """The inputs of any packs, read now; a collective of the replica.

        Args:
            planned: the same on every rank, as many for every replica.
            reader: of their index.
            idle: so many of the last carry no loss and do not count; they keep a replica busy that has no other pack.
        """
        mine = self._mine(planned)
        return self._inputs(planned, mine, self.read([planned[i] for i in mine], reader), idle)

    def read(self, packs: Sequence[PlannedPack], reader: PackReader) -> StepRead:
        """What this rank has to read for packs of its replica, read now."""
        tasks = rank_tasks(packs, self.groups.replica.size(), self.groups.replica.rank())
        return TaskReader(reader, self.encoder.decoder.reader, self._cache).step(tasks, self.encoder.known)

    def tokens_seen(self, steps: int) -> dict[str, int]:
        """Tokens by kind (text, vit, clean, noise) that so many steps trained on.

        They follow from the pack index, so they are the same whatever was restarted; what was rewound does not count,
        a step left out as not finite does.
        """
        size = self.run.training.global_batch_size
        ranges = [(start * size, stop * size) for start, stop in batches_before(steps, self.left_out)]
        parts = [(self.index.tokens_before(start), self.index.tokens_before(stop)) for start, stop in ranges]
        return {kind: sum(after[kind] - before[kind] for before, after in parts) for kind in parts[0][0]}

    def close(self) -> None:
        """End what reads ahead."""
        self.ahead.close()

    def packs(self, step: int) -> list[PlannedPack]:
        """The packs that this replica trains on in a step."""
        planned, mine = self._dealt(step)
        return [planned[i] for i in mine]

    def _deal(self, step: int) -> tuple[list[PlannedPack], Sequence[int]]:
        """(the packs of a step's global batch, which of them this replica trains on)."""
        batch = batch_of(step, self.left_out)
        planned = [self.index.pack(n) for n in self.index.global_batch(batch, self.run.training.global_batch_size)]
        return planned, self._mine(planned)

    def _mine(self, planned: Sequence[PlannedPack]) -> Sequence[int]:
        """Which of them this replica trains on."""
        return packs_of_replica(planned, self.groups.dp, self.groups.dp_rank)

    def _tasks(self, step: int) -> Sequence[Task]:
        """What this rank has to read for a step."""
        return rank_tasks(self.packs(step), self.groups.replica.size(), self.groups.replica.rank())

    def _inputs(self, planned: Sequence[PlannedPack], mine: Sequence[int], read: StepRead, idle: int = 0) -> StepInputs:
        counted = len(planned) - idle
        visuals = self.encoder.encode([planned[i] for i in mine], read.media)
        counts = LossCounts.of((p.pack for p in planned[:counted]), [p.sources for p in planned[:counted]])
        numbers = {name: number for number, name in enumerate(counts.by_source)}
        batches = [
            self._batch(planned[i], read.tokens[planned[i].number], v, [numbers[name] for name in planned[i].sources])
            for i, v in zip(mine, visuals, strict=True)
        ]
        return StepInputs(
            batches=[b if i < counted else b.without_loss() for i, b in zip(mine, batches, strict=True)],
            counts=counts,
            packs=tuple(p.number for p in planned[:counted]),
            mine=tuple(planned[i].number for i in mine),
            tokens=sum(p.pack.length for p in planned[:counted]),
            capacity=sum(p.pack.capacity for p in planned[:counted]),
            work=Work.total(Work.of(p.pack) for p in planned[:counted]),
            broken=sum(int((~v.valid).sum()) for i, v in zip(mine, visuals, strict=True) if i < counted),
        )

    def _batch(
        self, planned: PlannedPack, tokens: PackTokens, visuals: PackVisuals, sources: Sequence[int]
    ) -> RankBatch:
        """One pack as this rank sees it, on its device; `sources` numbers the source of each sample."""
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
            Layout.build(planned.pack, groups.cp, groups.tp, row_alignment(run)),
            tokens,
            visuals,
            noise,
            mape=Mape(run.model.mape),
            mape_step=run.model.mape_step,
            cp_rank=groups.cp_rank,
            tp_rank=groups.tp_rank,
            sources=sources,
        )
        return batch.to(groups.device, DTYPES[run.training.precision])
