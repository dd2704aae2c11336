"""Decode and encode the media of a step, shared out over the ranks of a replica.

Station: pack -> decode -> encoders -> [encodings on every rank of the replica] -> noising.  Every rank knows all items
from the pack index, takes its share by pixels, and gathers everyone's results once, before the schedule starts.  An
item that cannot be decoded is named once in a replica, by the rank that met it first; its zeros and its flag travel
with the others, so all ranks agree.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lance.data.decode import MediaDecoder
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PlannedPack
from megatron_lance.data.records import DataSetError, RecordError
from megatron_lance.data.tasks import MediaItem
from megatron_lance.encoders.vae import VideoAutoencoder
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.packing.batch import PackVisuals
from megatron_lance.packing.rng import stream
from megatron_lance.packing.segment import SegmentKind

logger = logging.getLogger(__name__)

DECODED_TOGETHER = 8
"""Items decoded before they are encoded; bounds the pixels in memory."""


ItemKey = tuple[str, str, int, str]
"""Source, file, row, element."""


@dataclass(frozen=True)
class _Job:
    """One media item of one pack: what to encode and the shape [rows, width] of the result."""

    pack: PlannedPack
    item: MediaItem
    rows: int
    width: int

    @property
    def pixels(self) -> int:
        """The cost by which jobs are shared out."""
        return len(self.item.frames) * self.item.size[0] * self.item.size[1]

    @property
    def key(self) -> ItemKey:
        """Where the bytes are; jobs of several packs or encoders may share them."""
        return self.item.source, self.item.file, self.item.row, self.item.element

    @property
    def size(self) -> int:
        """Values in the exchange buffer: the validity flag and the encoding."""
        return 1 + self.rows * self.width


def share_out(costs: Sequence[int], ranks: int) -> list[int]:
    """The rank of each job: the most expensive first, each to the rank with the least so far."""
    load = [0] * ranks
    owner = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        owner[job] = rank
        load[rank] += costs[job]
    return owner


class ReplicaEncoder:
    """Turns planned packs into encodings, with all ranks of a replica.

    Attributes:
        broken: cause of every item that this rank has named, by (source, file, row, element).

    Args:
        decoder: of this rank.
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
        self.widths = {"vit": hidden_size, "vae": latent_channels}
        self.seed = seed
        self.broken: dict[ItemKey, str] = {}
        self._named_elsewhere: set[ItemKey] = set()

    def _jobs(self, pack: PlannedPack) -> list[_Job]:
        segments = (p.segment for p in pack.pack.placed_segments() if p.segment.is_visual)
        return [
            _Job(pack, item, segment.content_length, self.widths[item.encoder])
            for item, segment in zip(pack.media, segments, strict=True)
        ]

    def _name(self, key: ItemKey, cause: str | None) -> None:
        """Take note of a broken item; report it if it is new and `cause` says that this rank met it."""
        if key in self.broken or key in self._named_elsewhere:
            return
        if cause is None:
            self._named_elsewhere.add(key)
            return
        self.broken[key] = cause
        logger.warning("broken media: source %s, file %s, row %d, %s: %s; its sample carries no loss", *key, cause)

    def _pixels(self, jobs: Sequence[_Job], reader: PackReader) -> list[torch.Tensor | ValueError]:
        """Decoded pixels [3, T, H, W] of each job, or why there are none."""
        results: dict[int, torch.Tensor | ValueError] = {}
        requests, places = [], []
        for place, job in enumerate(jobs):
            try:
                requests += reader.requests(job.pack.number, [job.item])
                places.append(place)
            except (RecordError, DataSetError) as error:
                results[place] = error
        results |= dict(zip(places, self.decoder(requests), strict=True))
        return [results[place] for place in range(len(jobs))]

    def _encode(self, job: _Job, pixels: torch.Tensor) -> torch.Tensor:
        """Encoding [rows, width] of one item, float32."""
        if job.item.encoder == "vit":
            return self.vit.encode([pixels])[0].float()
        sample = job.pack.rows[job.item.sample_index]
        address = (sample.sample.sample_id, sample.epoch, job.item.segment_index)
        latents = self.vae.encode(pixels, stream(self.seed, "posterior", *address))
        return latents.reshape(-1, latents.shape[-1]).float()

    def _own_buffer(
        self, jobs: Sequence[_Job], reader: PackReader, size: int
    ) -> tuple[torch.Tensor, dict[ItemKey, str]]:
        """Flags and encodings of this rank's jobs, one after another, float32 [size]; causes of its broken ones."""
        buffer = torch.zeros(size)
        causes: dict[ItemKey, str] = {}
        at = 0
        for job, pixels in self._decoded(jobs, reader):
            if isinstance(pixels, ValueError):
                causes[job.key] = str(pixels)
            else:
                encoding = self._encode(job, pixels)
                if encoding.shape != (job.rows, job.width):
                    raise RuntimeError(
                        f"{job.item}: encoded to {tuple(encoding.shape)}, planned {(job.rows, job.width)}"
                    )
                buffer[at] = 1.0
                buffer[at + 1 : at + job.size] = encoding.reshape(-1).cpu()
            at += job.size
        return buffer, causes

    def _decoded(self, jobs: Sequence[_Job], reader: PackReader) -> Iterator[tuple[_Job, torch.Tensor | ValueError]]:
        """Each job with its pixels or what is wrong with it; only the pixels of a few jobs are in memory at a time."""
        for first in range(0, len(jobs), DECODED_TOGETHER):
            part = jobs[first : first + DECODED_TOGETHER]
            yield from zip(part, self._pixels(part, reader), strict=True)

    def encode(self, packs: Sequence[PlannedPack], reader: PackReader) -> list[PackVisuals]:
        """Encodings of all packs, on every rank of the replica; a collective of the replica.

        Args:
            packs: the same on every rank.
            reader: reads media bytes.

        Returns:
            one per pack, on the CPU, float32.
        """
        jobs = [job for pack in packs for job in self._jobs(pack)]
        ranks, own_rank = self.group.size(), self.group.rank()
        owner = share_out([job.pixels for job in jobs], ranks)
        totals = [sum(job.size for job, r in zip(jobs, owner, strict=True) if r == rank) for rank in range(ranks)]
        own = [job for job, r in zip(jobs, owner, strict=True) if r == own_rank]
        buffer, causes = self._own_buffer(own, reader, max(totals, default=0))
        buffers = _gather(buffer, self.group)
        cursors = [0] * ranks
        results = []
        for job, rank in zip(jobs, owner, strict=True):
            values = buffers[rank][cursors[rank] : cursors[rank] + job.size]
            cursors[rank] += job.size
            valid = bool(values[0])
            results.append((valid, values[1:].reshape(job.rows, job.width)))
            if not valid:
                self._name(job.key, causes[job.key] if rank == own_rank else None)
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
