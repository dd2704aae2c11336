"""Encode the media of some packs, shared out over the ranks of a replica.

Station: reading -> encoders -> [encodings on every rank of the replica] -> noising.  Every rank knows all items from
the pack index, encodes its share by pixels, and gathers everyone's results once, before the schedule starts.  An item
that could not be decoded is named once in a replica, by the rank that met it first; its zeros and its flag travel with
the others, so all ranks agree.
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_lance.data.decode import MediaDecoder, ReadMedia
from megatron_lance.data.pack_index import PlannedPack
from megatron_lance.data.reading import Encoded, ReadItem
from megatron_lance.data.shares import ItemKey, MediaJob, key_of, shared_jobs
from megatron_lance.data.tasks import MediaItem
from megatron_lance.encoders.items import ItemEncoders
from megatron_lance.encoders.vae import VideoAutoencoder
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.packing.batch import PackVisuals
from megatron_lance.packing.rng import stream
from megatron_lance.packing.segment import SegmentKind

logger = logging.getLogger(__name__)

FINISHED_TOGETHER = 8
"""Items whose pixels are made before they are encoded; bounds the pixels in memory."""


_ReadItems = Mapping[tuple[int, MediaItem], ReadItem]


class ReplicaEncoder:
    """Turns planned packs into encodings, with all ranks of a replica.

    Attributes:
        broken: cause of every item that this rank has named, by (source, file, row, element).

    Args:
        decoder: of this rank; finishes what was read.
        vit: frozen.
        vae: frozen.
        group: the replica's ranks.
        hidden_size: width of ViT output.
        latent_channels: width of latents.
        seed: addresses the posterior's noise where it is sampled.
    """

    def __init__(
        self,
        decoder: MediaDecoder,
        vit: VitEncoder,
        vae: VideoAutoencoder,
        group: dist.ProcessGroup,
        *,
        hidden_size: int,
        latent_channels: int,
        seed: int,
    ) -> None:
        self.decoder, self.vit, self.vae, self.group = decoder, vit, vae, group
        self.encoders = ItemEncoders(vit, vae)
        self.widths = {"vit": hidden_size, "vae": latent_channels}
        self.seed = seed
        self.broken: dict[ItemKey, str] = {}
        self._named_elsewhere: dict[ItemKey, str] = {}

    @property
    def known(self) -> Mapping[ItemKey, str]:
        """Cause by item, of all that this rank knows to be broken; they need not be read again."""
        return ChainMap(self.broken, self._named_elsewhere)

    def _size(self, job: MediaJob) -> int:
        """Values in the exchange buffer: the validity flag and the encoding."""
        return 1 + job.rows * self.widths[job.item.encoder]

    def _name(self, key: ItemKey, cause: str | None) -> None:
        """Take note of a broken item; report it if it is new and `cause` says that this rank met it."""
        if key in self.broken or key in self._named_elsewhere:
            return
        if cause is None:
            self._named_elsewhere[key] = "found broken by another rank"
            return
        self.broken[key] = cause
        logger.warning("broken media: source %s, file %s, row %d, %s: %s; its sample carries no loss", *key, cause)

    def _encode(self, job: MediaJob, pixels: torch.Tensor) -> torch.Tensor:
        """Encoding [rows, width] of one item."""
        sample = job.pack.rows[job.item.sample_index]
        address = (sample.sample.sample_id, sample.epoch, job.item.segment_index)
        return self.encoders.encode(job.item.encoder, pixels, stream(self.seed, "posterior", *address))

    def _own_buffer(
        self, jobs: Sequence[MediaJob], media: _ReadItems, size: int
    ) -> tuple[torch.Tensor, dict[ItemKey, str]]:
        """Flags and encodings of this rank's jobs, one after another, float32 [size]; causes of its broken ones."""
        buffer = torch.zeros(size)
        causes: dict[ItemKey, str] = {}
        at = 0
        for job, result in self._encodings(jobs, media):
            if isinstance(result, ValueError):
                causes[key_of(job.item)] = str(result)
            else:
                encoding = result.float()
                shape = job.rows, self.widths[job.item.encoder]
                if encoding.shape != shape:
                    raise RuntimeError(f"{job.item}: encoded to {tuple(encoding.shape)}, planned {shape}")
                buffer[at] = 1.0
                buffer[at + 1 : at + self._size(job)] = encoding.reshape(-1).cpu()
            at += self._size(job)
        return buffer, causes

    def _encodings(
        self, jobs: Sequence[MediaJob], media: _ReadItems
    ) -> Iterator[tuple[MediaJob, torch.Tensor | ValueError]]:
        """Each job with its encoding or what is wrong with it; only the pixels of a few jobs are made at a time."""
        for first in range(0, len(jobs), FINISHED_TOGETHER):
            part = [(job, media[job.address]) for job in jobs[first : first + FINISHED_TOGETHER]]
            finished = iter(self.decoder.finish([one for _, one in part if isinstance(one, ReadMedia)]))
            for job, one in part:
                result = next(finished) if isinstance(one, ReadMedia) else one
                if isinstance(result, torch.Tensor):
                    result = self._encode(job, result)
                yield job, result.data if isinstance(result, Encoded) else result

    def encode(self, packs: Sequence[PlannedPack], media: _ReadItems) -> list[PackVisuals]:
        """Encodings of all packs, on every rank of the replica; a collective of the replica.

        Args:
            packs: the same on every rank.
            media: what this rank read for its share of them (`shares.rank_tasks`), by pack number and item.

        Returns:
            one per pack, on the CPU, float32.
        """
        ranks, own_rank = self.group.size(), self.group.rank()
        jobs = shared_jobs(packs, ranks)
        totals = [sum(self._size(job) for job, r in jobs if r == rank) for rank in range(ranks)]
        buffer, causes = self._own_buffer([job for job, r in jobs if r == own_rank], media, max(totals, default=0))
        buffers = _gather(buffer, self.group)
        cursors = [0] * ranks
        results = []
        for job, rank in jobs:
            values = buffers[rank][cursors[rank] : cursors[rank] + self._size(job)]
            cursors[rank] += self._size(job)
            valid = bool(values[0])
            results.append((valid, values[1:].reshape(job.rows, -1)))
            if not valid:
                key = key_of(job.item)
                self._name(key, causes[key] if rank == own_rank else None)
        found = iter(results)
        return [self._visuals(pack, [next(found) for _ in pack.media]) for pack in packs]

    def _visuals(self, pack: PlannedPack, results: Sequence[tuple[bool, torch.Tensor]]) -> PackVisuals:
        kinds = [p.segment.kind for p in pack.pack.placed_segments() if p.segment.is_visual]
        vit = [values for kind, (_, values) in zip(kinds, results, strict=True) if kind is SegmentKind.VIT]
        vae = [values for kind, (_, values) in zip(kinds, results, strict=True) if kind is not SegmentKind.VIT]
        return PackVisuals(
            vit=torch.cat([torch.zeros(0, self.widths["vit"]), *vit]),
            latents=torch.cat([torch.zeros(0, self.widths["vae"]), *vae]),
            valid=torch.tensor([ok for ok, _ in results], dtype=torch.bool),
        )


def _gather(buffer: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Every rank's buffer, on the CPU; through the GPU where the group's backend needs it."""
    if group.size() == 1 or not buffer.numel():
        return [buffer] * group.size()
    if torch.cuda.is_available():
        buffer = buffer.cuda()
    buffers = [torch.empty_like(buffer) for _ in range(group.size())]
    dist.all_gather(buffers, buffer, group=group)
    return [b.cpu() for b in buffers]
