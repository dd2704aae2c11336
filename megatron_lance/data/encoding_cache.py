"""Encoding cache: latents and ViT features on disk, by a hash of the media file and of what is taken from it.

Station: tools/encode_latents.py -> [encoding cache] -> reading.  In: encodings with their keys.  Out: the same bits.  A
folder holds cache.json (what encoded) and shards of safetensors, each of which appears whole or not at all, so writing
may stop and go on at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_lance.config.errors import UserError
from megatron_lance.data.decode import DecodeRequest

CACHE_FILE = "cache.json"
VERSION = 2
"""Raised whenever the same media would give other pixels, or be kept otherwise."""
SHARD_BYTES = 1 << 28
"""Encodings that a writer holds before it writes a shard."""
_OPEN_SHARDS = 64


class CacheError(UserError):
    """An encoding cache that is absent, damaged, or of other encoders."""


def cache_key(request: DecodeRequest) -> str:
    """The key of an encoding: media bytes, frames, bucket, size and encoder, 32 hex digits."""
    taken = json.dumps([request.frames, request.bucket, request.size, request.normalize])
    digest = hashlib.blake2b(taken.encode(), digest_size=16)
    digest.update(hashlib.sha256(request.data).digest())
    return digest.hexdigest()


class EncodingCache:
    """Encodings by key; a copy made by pickling opens the files anew.

    Attributes:
        folder: it lies in.
    """

    def __init__(self, folder: str | Path) -> None:
        """List the keys of all shards.

        Raises:
            CacheError: if there is no cache, or a shard cannot be read.
        """
        self.folder = Path(folder)
        if not (self.folder / CACHE_FILE).is_file():
            raise CacheError(
                f"data.encoding_cache '{folder}': holds no {CACHE_FILE}; run tools/encode_latents.py, or set "
                "data.encoding_cache=''"
            )
        self._open = lru_cache(maxsize=_OPEN_SHARDS)(self._open_shard)
        self._shards = sorted(self.folder.glob("*.safetensors"))
        self._shard_of = {key: number for number in range(len(self._shards)) for key in self._open(number).keys()}

    def __reduce__(self) -> tuple[Any, ...]:
        return EncodingCache, (self.folder,)

    def __len__(self) -> int:
        """Encodings."""
        return len(self._shard_of)

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def get(self, key: str) -> torch.Tensor | None:
        """The encoding [rows, width] of a key as it was written; None if there is none."""
        number = self._shard_of.get(key)
        if number is None:
            return None
        tensor: torch.Tensor = self._open(number).get_tensor(key)
        return tensor

    def check(self, identity: Mapping[str, str]) -> None:
        """Raise CacheError unless the cache was made by these encoders."""
        check_identity(self.folder, identity)

    def _open_shard(self, number: int) -> Any:
        try:
            return safe_open(self._shards[number], framework="pt")
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"data.encoding_cache '{self.folder}': {self._shards[number].name} cannot be read ({error}); delete it "
                "and run tools/encode_latents.py again"
            ) from error


def check_identity(folder: Path, identity: Mapping[str, str]) -> None:
    """Raise CacheError unless the cache of a folder was made by these encoders."""
    try:
        content = json.loads((folder / CACHE_FILE).read_text(encoding="utf-8"))
        found, version = dict(content["identity"]), content["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"data.encoding_cache '{folder}': {CACHE_FILE} cannot be read ({error!r}); encode into another folder"
        ) from error
    names = dict.fromkeys([*found, *identity])
    differing = [
        f"{n} {found.get(n)!r}, the run has {identity.get(n)!r}" for n in names if found.get(n) != identity.get(n)
    ]
    if version != VERSION:
        differing.insert(0, f"version {version}, this program reads {VERSION}")
    if differing:
        raise CacheError(
            f"data.encoding_cache '{folder}': was made with {'; '.join(differing)}; use the same encoders, or run "
            "tools/encode_latents.py into another folder"
        )


class CacheWriter:
    """Adds encodings to a cache, shard by shard.

    Args:
        folder: new, or of a cache by the same encoders.
        identity: of the encoders.
        rank: of this process among those that write.

    Raises:
        CacheError: if the folder's cache is of other encoders, or cannot be written.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, str], rank: int = 0) -> None:
        self._folder, self._rank = Path(folder), rank
        self._waiting: dict[str, torch.Tensor] = {}
        self._bytes = 0
        if not (self._folder / CACHE_FILE).exists():
            text = json.dumps({"version": VERSION, "identity": dict(identity)}, indent=1, sort_keys=True)
            partial = self._folder / f".{CACHE_FILE}.{rank}"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                partial.write_text(text + "\n", encoding="utf-8")
                partial.replace(self._folder / CACHE_FILE)
            except OSError as error:
                raise CacheError(
                    f"data.encoding_cache '{folder}': cannot be written ({error.strerror}); name another folder"
                ) from error
        check_identity(self._folder, identity)

    def add(self, key: str, encoding: torch.Tensor) -> None:
        """Keep an encoding [rows, width]; it is on disk once its shard is full or `flush` was called."""
        self._waiting[key] = encoding.cpu().contiguous()
        self._bytes += encoding.numel() * encoding.element_size()
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def close(self) -> None:
        """Write what is left."""
        self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._waiting:
            return
        name = self._folder / f"{self._rank:04}-{uuid4().hex}.safetensors"  # another job may write here too
        partial = name.with_name(f".{name.name}.partial")
        save_file(self._waiting, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(name)
        self._waiting, self._bytes = {}, 0
