"""The cache of encodings: the same bits with it, no cache of other encoders, writing that stops and goes on."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lance.config.schema import RunConfig
from megatron_lance.data.decode import DecodeRequest, MediaReader, ReadMedia
from megatron_lance.data.encoding_cache import CACHE_FILE, CacheError, CacheWriter, EncodingCache, cache_key
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex, PlannedPack
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.reading import Encoded, StepRead, TaskReader
from megatron_lance.data.shares import rank_tasks
from megatron_lance.encoders.items import ItemEncoders
from megatron_lance.encoders.offline import _Packs, encode_index
from megatron_lance.encoders.vae import build_vae
from megatron_lance.encoders.vit import VitEncoder
from tests.tiny import TinyRun

IDENTITY = {"vit": "a", "vae": "b", "encoders.dtype": "float32"}


def encoders(run: RunConfig) -> ItemEncoders:
    seed = run.training.seed
    return ItemEncoders(
        VitEncoder.build(run.encoders, run.model.hidden_size, seed),
        build_vae(run.encoders, run.model.latent_channels, seed),
    )


def read(run: RunConfig, cache: EncodingCache | None) -> StepRead:
    """All media of the index."""
    index = PackIndex.open(run.data.pack_index)
    packs = PackReader(run.data, index, Tokenizer(run.data.tokenizer), run.training.seed, run.model)
    tasks = rank_tasks([index.pack(n) for n in range(len(index))], 1, 0)
    return TaskReader(packs, MediaReader("host", 1), cache).step(tasks, {})


@pytest.fixture(scope="module")
def run(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run in bfloat16 with a cache that holds everything."""
    cache = tmp_path_factory.mktemp("cache") / "cache"
    run = tiny_run.load(f"data.encoding_cache={cache}", "encoders.dtype=bfloat16")
    done = encode_index(run, rank=0, ranks=1, progress=False)
    assert (done.encoded, done.known, done.broken) == (12, 0, 0)  # twelve files, though the index has two epochs
    return run


def test_encodings_out_of_the_cache_are_the_same_bits(run: RunConfig) -> None:
    cached, fresh = read(run, EncodingCache(run.data.encoding_cache)), read(run, None)
    make = encoders(run)
    assert cached.media.keys() == fresh.media.keys() and len(fresh.media) > 12
    for (number, item), one in fresh.media.items():
        ours = cached.media[number, item]
        assert isinstance(ours, Encoded) and isinstance(one, ReadMedia)
        expected = make.encode(item.encoder, _pixels(one), None)
        assert ours.data.dtype == expected.dtype and torch.equal(ours.data, expected)


def _pixels(one: ReadMedia) -> torch.Tensor:
    from megatron_lance.data.decode import MediaDecoder

    pixels = MediaDecoder("host", 1).finish([one])[0]
    assert isinstance(pixels, torch.Tensor)
    return pixels


def test_encoding_again_does_nothing_and_goes_on_after_a_loss(run: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(run.data.encoding_cache, tmp_path / "cache")
    run = replace(run, data=replace(run.data, encoding_cache=str(tmp_path / "cache"), workers=1))
    again = encode_index(run, rank=0, ranks=1, progress=False)
    assert (again.encoded, again.known) == (0, 12)
    (shard,) = (tmp_path / "cache").glob("*.safetensors")
    shard.unlink()
    halves = [encode_index(run, rank=rank, ranks=2, progress=False) for rank in range(2)]
    assert sum(done.encoded for done in halves) >= 12 and all(done.encoded for done in halves)
    assert sorted(EncodingCache(tmp_path / "cache")._shard_of) == sorted(
        EncodingCache(run.data.encoding_cache)._shard_of
    )
    assert len(EncodingCache(tmp_path / "cache")) == 12


def test_writers_at_the_same_time_keep_what_both_wrote(tmp_path: Path) -> None:
    writers = [CacheWriter(tmp_path, IDENTITY) for _ in range(2)]
    for number, writer in enumerate(writers):
        writer.add(f"key {number}", torch.full((2, 3), float(number)))
    for writer in writers:
        writer.close()
    cache = EncodingCache(tmp_path)
    assert [int(cache.get(f"key {number}").sum()) for number in range(2)] == [0, 6]  # type: ignore[union-attr]


def test_what_reads_ahead_may_ask_for_a_pack_at_the_same_time(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    index = PackIndex.open(run.data.pack_index)
    pack = index.pack

    def slowly(number: int) -> PlannedPack:
        time.sleep(0.2)
        return pack(number)

    monkeypatch.setattr(index, "pack", slowly)
    packs = _Packs(index, rank=0, ranks=1)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(packs.tasks, (0, 0))
    assert first and first == second


def test_the_key_names_bytes_and_what_is_taken_of_them() -> None:
    request = DecodeRequest(b"clip", (0, 1), (64, 96), (64, 96), "vae")
    others = [
        replace(request, data=b"clop"),
        replace(request, frames=(0, 2)),
        replace(request, bucket=(64, 97)),
        replace(request, size=(64, 80)),
        replace(request, normalize="vit"),
    ]
    assert len({cache_key(one) for one in (request, *others)}) == 6
    assert cache_key(request) == cache_key(replace(request))


def test_another_encoder_is_refused(run: RunConfig) -> None:
    cache = EncodingCache(run.data.encoding_cache)
    own = encoders(run).identity(run.encoders, "host")
    cache.check(own)
    pickle.loads(pickle.dumps(cache)).check(own)
    dtype = replace(run.encoders, dtype="float32")
    with pytest.raises(CacheError, match="was made with .*encoders.dtype 'bfloat16', the run has 'float32'"):
        cache.check(encoders(replace(run, encoders=dtype)).identity(dtype, "host"))
    seed = replace(run, training=replace(run.training, seed=9))
    with pytest.raises(CacheError, match=r"was made with vit '\w+', the run has '\w+'; use the same encoders"):
        cache.check(encoders(seed).identity(run.encoders, "host"))
    with pytest.raises(CacheError, match="data.decode 'host', the run has 'mixed'"):
        cache.check(own | {"data.decode": "mixed"})
    with pytest.raises(CacheError, match="was made with vit"):
        CacheWriter(run.data.encoding_cache, own | {"vit": "another"})


def test_a_cache_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="holds no cache.json; run tools/encode_latents.py"):
        EncodingCache(tmp_path)
    writer = CacheWriter(tmp_path / "new", IDENTITY)
    writer.add("a", torch.ones(2, 3))
    assert len(EncodingCache(tmp_path / "new")) == 0  # a shard appears whole
    writer.close()
    cache = EncodingCache(tmp_path / "new")
    found = cache.get("a")
    assert found is not None and torch.equal(found, torch.ones(2, 3)) and "b" not in cache and cache.get("b") is None
    (shard,) = (tmp_path / "new").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(CacheError, match=r"safetensors cannot be read .* delete it and run tools/encode_latents.py"):
        EncodingCache(tmp_path / "new")
    (tmp_path / "new" / CACHE_FILE).write_text(json.dumps({"version": 0, "identity": IDENTITY}))
    with pytest.raises(CacheError, match="version 0, this program reads 2"):
        CacheWriter(tmp_path / "new", IDENTITY)
    (tmp_path / "new" / CACHE_FILE).write_text("{")
    with pytest.raises(CacheError, match="cache.json cannot be read"):
        CacheWriter(tmp_path / "new", IDENTITY)
    with pytest.raises(CacheError, match="cannot be written"):
        CacheWriter(shard / "below", IDENTITY)
