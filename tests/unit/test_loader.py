"""Reading packs by number: the planned tokens, only the media asked for, decoded to the planned grids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megatron_lance.config.schema import DataConfig, SourceConfig
from megatron_lance.data.decode import MediaDecoder
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.pack_index_format import PackIndexError
from megatron_lance.data.prepack import prepack
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.sizes import vae_grid, vit_grid
from megatron_lance.packing.batch import PackTokens
from tests.unit.data_config import MODEL, real_data

SEED = 11


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return real_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def index(config: DataConfig) -> PackIndex:
    return prepack(config, MODEL, SEED, 2, progress=False)


@pytest.fixture(scope="module")
def tokenizer(config: DataConfig) -> Tokenizer:
    return Tokenizer(config.tokenizer)


def test_tokens_fit_the_planned_structure(config: DataConfig, index: PackIndex, tokenizer: Tokenizer) -> None:
    reader = PackReader(config, index, tokenizer, SEED, MODEL)
    for number in range(len(index)):
        pack = index.pack(number).pack
        ids = reader.tokens(number).token_ids
        is_pad = torch.zeros(pack.length, dtype=torch.bool)
        for placed in pack.placed_segments():
            if placed.segment.is_visual:
                start, stop = placed.content
                is_pad[start:stop] = True
                assert ids[start - 1] == tokenizer.vision_start and ids[stop] == tokenizer.vision_end
        assert torch.equal(ids == tokenizer.video_pad, is_pad)
        assert (ids < tokenizer.size).all()
        for start in pack.sample_starts:
            assert ids[start] == tokenizer.im_start


def test_reading_depends_on_the_number_only(config: DataConfig, index: PackIndex, tokenizer: Tokenizer) -> None:
    forth = PackReader(config, index, tokenizer)
    back = PackReader(config, index, tokenizer)
    numbers = list(range(len(index)))
    read: dict[int, PackTokens] = {number: forth.tokens(number) for number in numbers}
    for number in reversed(numbers):
        again = back.tokens(number + len(index))  # the same pack in a later epoch
        assert torch.equal(again.token_ids, read[number].token_ids)
        assert torch.equal(again.ce_labels, read[number].ce_labels)
        assert again.ce_rows.numel() == index.pack(number).ce_rows


def test_requests_decode_to_the_planned_grids(config: DataConfig, index: PackIndex, tokenizer: Tokenizer) -> None:
    reader, decode = PackReader(config, index, tokenizer), MediaDecoder("host", threads=2)
    planned = index.pack(0)
    every_second = planned.media[::2]
    for item, pixels in zip(every_second, decode(reader.requests(0, every_second)), strict=True):
        assert isinstance(pixels, torch.Tensor)
        assert pixels.shape == (3, len(item.frames), *item.size)
        grid = (vae_grid if item.encoder == "vae" else vit_grid)(len(item.frames), item.size)
        assert grid == planned.pack.samples[item.sample_index].segments[item.segment_index].grid


def test_items_of_another_pack_are_refused(config: DataConfig, index: PackIndex, tokenizer: Tokenizer) -> None:
    reader = PackReader(config, index, tokenizer)
    alien = replace(index.pack(0).media[0], row=999)
    with pytest.raises(ValueError, match="is no media item of pack 0"):
        reader.requests(0, [alien])


def test_reader_refuses_another_configuration(config: DataConfig, index: PackIndex, tokenizer: Tokenizer) -> None:
    with pytest.raises(PackIndexError, match="data.seq_length: index has 6000, run has 7000"):
        PackReader(replace(config, seq_length=7000), index, tokenizer)
    with pytest.raises(PackIndexError, match="seed: index has 11, run has 12"):
        PackReader(config, index, tokenizer, SEED + 1)
    with pytest.raises(PackIndexError, match=r"sources.x2t_video"):
        PackReader(replace(config, sources=config.sources[:-1]), index, tokenizer)


def test_changed_text_names_the_record(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()

    def write(answer: str) -> None:
        table = {"caption_i": ["Be brief."], "caption_q": ["Why?"], "caption_a": [answer]}
        pq.write_table(pa.table(table), tmp_path / "rows" / "a.parquet", compression="none", use_dictionary=False)

    write("Because of it.")
    source = SourceConfig("chat", str(tmp_path / "rows"), "t2t")
    config = replace(config, sources=(source,), pack_index=str(tmp_path / "index"))
    index = prepack(config, MODEL, SEED, 2, progress=False)
    write("Zqxjkvb, w it.")  # as many bytes, other tokens
    reader = PackReader(config, index, tokenizer)
    with pytest.raises(PackIndexError, match=r"record chat/a.parquet/0: now gives .* run tools/prepack.py --force"):
        reader.tokens(0)
