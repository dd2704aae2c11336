"""Encode the media of a pack index into a cache, before training.

Station: pack index -> reading -> [encoders -> encoding cache].  In: a configuration.  Out: shards of encodings, by a
hash of what was encoded, so that media which occur in many packs and epochs are encoded once.
"""

from __future__ import annotations

import logging
import os
from contextlib import closing
from dataclasses import dataclass
from threading import Lock

import torch
from tqdm import tqdm

from megatron_lance.config.schema import RunConfig
from megatron_lance.data.background import Ahead, StepReader
from megatron_lance.data.decode import MediaDecoder, ReadMedia
from megatron_lance.data.encoding_cache import CacheWriter, EncodingCache
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.reading import Encoded, StepRead, TaskReader
from megatron_lance.data.shares import ItemKey, MediaTask, key_of
from megatron_lance.data.tasks import MediaItem
from megatron_lance.encoders.items import ItemEncoders
from megatron_lance.encoders.vae import build_vae
from megatron_lance.encoders.vit import VitEncoder

logger = logging.getLogger(__name__)


@dataclass
class Done:
    """What came of the media items of a rank's packs.

    Attributes:
        encoded: now.
        known: that the cache had.
        broken: that could not be decoded.
    """

    encoded: int = 0
    known: int = 0
    broken: int = 0


class _Packs:
    """The media tasks of a rank's packs; what occurred in an earlier pack is left out.

    A pack may be asked for again as long as it is among the last REMEMBERED.
    """

    REMEMBERED = 1024

    def __init__(self, index: PackIndex, rank: int, ranks: int) -> None:
        self._index, self._rank, self._ranks = index, rank, ranks
        self._tasks: dict[int, list[MediaTask]] = {}
        self._lock = Lock()
        self._seen: set[int] = set()  # hashes: a clash only leaves an item to be encoded in training

    def __len__(self) -> int:
        return -(-(len(self._index) - self._rank) // self._ranks)

    def tasks(self, number: int) -> list[MediaTask]:
        """Of the rank's pack of a number; to be asked for in order.  Behind the last one there is nothing to do."""
        if number >= len(self):
            return []
        with self._lock:  # the thread that reads ahead asks too
            return self._of(number)

    def _of(self, number: int) -> list[MediaTask]:
        """Of a pack that there is."""
        if number not in self._tasks:
            pack = self._index.pack(number * self._ranks + self._rank)
            new: dict[ItemKey, list[MediaItem]] = {}
            for item in pack.media:
                taken = hash((*key_of(item), item.frames, item.bucket, item.size, item.encoder))
                if taken not in self._seen:
                    self._seen.add(taken)
                    new.setdefault(key_of(item), []).append(item)
            self._tasks.pop(number - self.REMEMBERED, None)
            self._tasks[number] = [MediaTask(pack.number, tuple(items)) for items in new.values()]
        return self._tasks[number]


def encode_index(run: RunConfig, rank: int, ranks: int, progress: bool) -> Done:
    """Encode what the cache of a configuration lacks of its pack index.

    Args:
        run: `data.encoding_cache` is the folder.
        rank: of this process.
        ranks: that share the packs out.
        progress: draw a bar on stderr.

    Raises:
        UserError: if index, encoders or cache are not usable.
    """
    seed, data = run.training.seed, run.data
    index = PackIndex.open(data.pack_index)
    packs = PackReader(data, index, Tokenizer(data.tokenizer), seed, run.model)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
    encoders = ItemEncoders(
        VitEncoder.build(run.encoders, run.model.hidden_size, seed).to(device or torch.device("cpu")),
        build_vae(run.encoders, run.model.latent_channels, seed).to(device or torch.device("cpu")),
    )
    decoder = MediaDecoder(data.decode, data.decode_threads, None if device is None else device.index)
    writer = CacheWriter(data.encoding_cache, encoders.identity(run.encoders, data.decode), rank)
    reader = TaskReader(packs, decoder.reader, EncodingCache(data.encoding_cache))
    done, share = Done(), _Packs(index, rank, ranks)
    ahead = StepReader(reader, share.tasks, Ahead(data.workers, data.steps_ahead, data.media_seconds), {}, len(share))
    with closing(ahead), closing(writer):
        for number in tqdm(range(len(share)), desc="encode", unit="pack", disable=not progress):
            _encode(ahead.step(number), encoders, decoder, writer, done)
    return done


def _encode(read: StepRead, encoders: ItemEncoders, decoder: MediaDecoder, writer: CacheWriter, done: Done) -> None:
    """Encode what was read of a pack."""
    for (_, item), one in read.media.items():
        result = decoder.finish([one])[0] if isinstance(one, ReadMedia) else one
        if isinstance(result, Encoded):
            done.known += 1
        elif isinstance(result, torch.Tensor) and isinstance(one, ReadMedia):
            writer.add(one.key, encoders.encode(item.encoder, result, None))
            done.encoded += 1
        else:
            done.broken += 1
            logger.warning("broken media: source %s, file %s, row %d, %s: %s", *key_of(item), result)
