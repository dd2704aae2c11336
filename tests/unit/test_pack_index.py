"""Prepack and the pack index: round trip, determinism, unusable rows, errors, the command line."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_lance.config.loader import ConfigError
from megatron_lance.config.schema import DataConfig, PromptConfig, SourceConfig
from megatron_lance.data import pack_index, pack_index_format
from megatron_lance.data.loader import PackReader
from megatron_lance.data.mixture import Draw, MixtureSource, mix
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.pack_index_format import BATCH, INDEX_FILE, VERSION, PackIndexError, PlannedRow, shaping_values
from megatron_lance.data.prepack import prepack
from megatron_lance.data.prompt import Tokenizer, TokenizerError
from megatron_lance.data.records import DataSetError, RecordReader
from megatron_lance.packing.packer import mask_pairs
from tests.shared import REPOSITORY, shared_path
from tests.unit.data_config import MODEL, SOURCES, real_data

SEED = 11


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return real_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(config: DataConfig) -> Tokenizer:
    return Tokenizer(config.tokenizer)


@pytest.fixture(scope="module")
def index(config: DataConfig) -> PackIndex:
    return prepack(config, MODEL, SEED, 2, progress=False)


def test_mixture_holds_shares_and_sees_every_row_before_one_again() -> None:
    sources = [MixtureSource("a", (4, 6), 3.0), MixtureSource("b", (10,) * 3, 1.0), MixtureSource("off", (5,), 0.0)]
    draws = list(mix(sources, 3, 2, 2))
    assert len(draws) == 80
    assert Counter(d.source for d in draws) == {0: 60, 1: 20}
    assert Counter(d.source for d in draws[:20]) == {0: 15, 1: 5}
    for epoch in range(6):
        assert sorted(d.row for d in draws if d.source == 0 and d.epoch == epoch) == list(range(10))
    assert len(set(draws)) == len(draws)
    assert draws == list(mix(sources, 3, 2, 2))
    assert draws[:40] == list(mix(sources, 3, 1, 2))
    assert draws != list(mix(sources, 4, 2, 2))
    assert list(mix([MixtureSource("one", (1,), 1.0)], 0, 1, 8)) == [Draw(0, 0, 0)]


def test_the_rows_of_a_row_group_are_drawn_in_one_stretch() -> None:
    rows = [draw.row for draw in mix([MixtureSource("a", (10,) * 12, 1.0)], 3, 2, 3)]
    for epoch in (rows[:120], rows[120:]):
        stretches = [{row // 10 for row in epoch[first : first + 30]} for first in range(0, 120, 30)]
        assert all(len(groups) == 3 for groups in stretches) and set().union(*stretches) == set(range(12))
        assert epoch[:30] != sorted(epoch[:30])
    assert rows[:120] != rows[120:]


def test_mixture_refuses_bad_sources() -> None:
    for sources, message in (
        ([], "no source with a positive weight"),
        ([MixtureSource("a", (), 1.0)], "data.sources a: has no rows"),
        ([MixtureSource("a", (1,), -1.0)], r"a.weight -1.0: must not be negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            mix(sources, 0, 1, 8)


def test_index_holds_every_usable_draw_once(config: DataConfig, index: PackIndex) -> None:
    planned = [index.pack(n) for n in range(len(index))]
    rows = planned_rows(index)
    keys = [(row.sample.sample_id, row.epoch) for row in rows]
    readers = [RecordReader(source) for source in config.sources]
    total = sum(reader.footer(f.name).rows for reader in readers for f in reader.files)
    assert len(set(keys)) == len(keys) == index.counts["samples"] == 2 * total
    assert {str(row.sample.task) for row in rows} == set(SOURCES.values())
    for pack in planned:
        assert pack.pack.length <= config.seq_length == pack.pack.capacity
        assert pack.mask_pairs == sum(mask_pairs(s.segments) for s in pack.pack.samples)
        visual = [(p.sample_index, p.segment_index) for p in pack.pack.placed_segments() if p.segment.is_visual]
        assert [(item.sample_index, item.segment_index) for item in pack.media] == visual
        assert (pack.ce_rows, pack.velocity_rows) == (pack.pack.ce_rows, pack.pack.velocity_rows)
    assert index.counts["tokens"] == sum(pack.pack.length for pack in planned)


def test_prepack_is_deterministic(config: DataConfig, index: PackIndex, tmp_path: Path) -> None:
    again = prepack(replace(config, pack_index=str(tmp_path / "again")), MODEL, SEED, 2, progress=False)
    assert again.hash == index.hash
    assert [again.pack(n) for n in range(len(again))] == [index.pack(n) for n in range(len(index))]
    other = prepack(replace(config, pack_index=str(tmp_path / "other")), MODEL, SEED + 1, 2, progress=False)
    assert other.hash != index.hash
    turned = replace(config, sources=config.sources[::-1], pack_index=str(tmp_path / "turned"))
    assert prepack(turned, MODEL, SEED, 2, progress=False).hash != index.hash


def test_numbers_go_on_with_new_epochs(index: PackIndex) -> None:
    n = len(index)
    batches = [index.global_batch(step, 4) for step in range(n)]
    assert [number for batch in batches for number in batch] == list(range(4 * n))
    first, later = index.pack(1), index.pack(n + 1)
    assert later.pack == first.pack and later.media == first.media
    highest = max(epoch for k in range(n) for epoch in index.pack(k).epochs)
    assert later.epochs == tuple(epoch + highest + 1 for epoch in first.epochs)


@pytest.mark.parametrize("batch", [BATCH, 2], ids=["one record batch", "many"])
def test_tokens_are_counted_by_kind_over_all_laps(
    batch: int, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pack_index, pack_index_format):
        monkeypatch.setattr(module, "BATCH", batch)
    index = prepack(replace(config, pack_index=str(tmp_path / "index")), MODEL, SEED, 2, progress=False)
    assert len(index) > 2
    seen = dict.fromkeys(("text", "vit", "clean", "noise"), 0)
    for number in range(2 * len(index) + 1):
        assert index.tokens_before(number) == seen
        for segment in (s for sample in index.pack(number).pack.samples for s in sample.segments):
            seen["text"] += segment.length - segment.content_length
            seen[str(segment.kind)] += segment.content_length
    assert min(seen.values()) > 0
    assert sum(index.tokens_before(len(index)).values()) == index.counts["tokens"]


def test_pack_as_text_shows_every_segment(index: PackIndex) -> None:
    pack = index.pack(0)
    text = str(pack)
    assert text.count("\n") == len(pack.rows) + sum(len(s.segments) for s in pack.pack.samples)
    assert all(row.sample.sample_id in text for row in pack.rows)


def unusable_lines(index: PackIndex) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (index.folder / "unusable.jsonl").read_text().splitlines()]


def planned_rows(index: PackIndex) -> list[PlannedRow]:
    return [row for number in range(len(index)) for row in index.pack(number).rows]


@pytest.fixture(scope="module")
def bad_config(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A good source of 6 rows and one of 7 with bad ones, 3 epochs."""
    bad = SourceConfig("bad", str(shared_path("data", "bad_text2video.parquet")), "t2v")
    folder = str(tmp_path_factory.mktemp("bad") / "index")
    return replace(config, sources=(*config.sources[:1], bad), pack_index=folder, epochs=3)


def test_unusable_rows_are_named_once_and_replaced(
    bad_config: DataConfig, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        index = prepack(bad_config, MODEL, SEED, 2, progress=False)
    lines, rows = unusable_lines(index), planned_rows(index)
    unusable = {line["row"] for line in lines}
    assert {0, 1, 2, 3, 4} <= unusable  # truncated, empty, no video, a picture, one frame
    assert 6 not in unusable  # the good clip
    assert {line["source"] for line in lines} == {"bad"} and all(line["cause"] for line in lines)
    assert len(unusable) == len(lines) == index.counts["unusable"]
    assert len([r for r in caplog.records if r.message.startswith("unusable row")]) == len(lines)
    # Epochs keep their sizes, and sources their shares.
    draws = list(
        mix([MixtureSource("text2image", (2, 2, 2), 1.0), MixtureSource("bad", (2, 2, 2, 1), 1.0)], SEED, 3, 8)
    )
    assert index.counts["samples"] == len(rows) == len(draws) == 3 * (6 + 7)
    drawn = Counter((("text2image", "bad")[draw.source], draw.epoch) for draw in draws)
    assert Counter((row.source, row.epoch) for row in rows) == drawn
    # Each bad row is stood in for by usable ones, once per draw.
    assert not unusable & {row.row for row in rows if row.source == "bad"}
    substitutes = [row for row in rows if " for " in row.sample.sample_id]
    assert Counter(row.sample.sample_id for row in substitutes) == Counter(
        s for line in lines for s in line["substitutes"]
    )
    assert len(substitutes) == index.counts["substituted"] == sum(d.source == 1 and d.row in unusable for d in draws)
    for row in substitutes:
        assert row.sample.sample_id.startswith(f"bad/bad_text2video.parquet/{row.row} for bad/bad_text2video.parquet/")
    # A substitute has a name of its own in every epoch, so its noise is not that of the row's own draw.
    assert len({(row.sample.sample_id, row.epoch) for row in rows}) == len(rows)
    reader = PackReader(bad_config, index, tokenizer, SEED, MODEL)
    assert sum(reader.tokens(number).token_ids.numel() for number in range(len(index))) == index.counts["tokens"]


def test_of_very_many_unusable_rows_the_first_are_named(
    bad_config: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_lance.data.prepack._NAMED", 2)
    with caplog.at_level(logging.WARNING):
        index = prepack(replace(bad_config, pack_index=str(tmp_path / "index")), MODEL, SEED, 2, progress=False)
    unusable, substituted = index.counts["unusable"], index.counts["substituted"]
    assert unusable > 2 and len(unusable_lines(index)) == unusable
    *named, further, told = [r.message for r in caplog.records if "unusable" in r.message]
    assert len(named) == 2 and all(message.startswith("unusable row: bad/") for message in named)
    assert further == "source bad: further unusable rows stand in unusable.jsonl of the index"
    assert told == (
        f"source bad: {unusable} of 7 rows are unusable; {substituted} samples are substitutes from the others"
    )


def substitutions(config: DataConfig, folder: Path, seed: int) -> dict[tuple[str, int], int]:
    """The row taken in place of each draw of a bad one, by sample id behind `for` and epoch."""
    index = prepack(replace(config, pack_index=str(folder)), MODEL, seed, 2, progress=False)
    parted = [(row.sample.sample_id.partition(" for ")[2], row) for row in planned_rows(index)]
    return {(place, row.epoch): row.row for place, row in parted if place}


def test_substitutes_are_addressed(bad_config: DataConfig, tmp_path: Path) -> None:
    found = substitutions(bad_config, tmp_path / "first", SEED)
    assert found == substitutions(bad_config, tmp_path / "again", SEED)
    assert found != substitutions(bad_config, tmp_path / "seed", SEED + 1)
    assert len({tuple(row for (_, e), row in sorted(found.items()) if e == epoch) for epoch in range(3)}) > 1
    # Neither other sources nor further epochs change what stands in for a draw.
    alone = replace(bad_config, sources=bad_config.sources[1:], epochs=1)
    assert substitutions(alone, tmp_path / "alone", SEED) == {k: v for k, v in found.items() if k[1] == 0}


def test_a_substitute_may_be_a_row_that_was_not_drawn(
    config: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = pq.read_table(config.sources[0].path).slice(0, 2).to_pydict()
    bad = {"caption": ["bad"] * 20, "image_bytes": [b"no picture"] * 20}
    table = {name: bad[name] + good[name] for name in bad}
    for name, rows in (("rare", table), ("often", {n: v * 10 for n, v in good.items()})):
        pq.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    sources = tuple(
        replace(config.sources[0], name=name, path=str(tmp_path / f"{name}.parquet"), weight=weight)
        for name, weight in (("rare", 1.0), ("often", 41.0))
    )
    config = replace(config, sources=sources, pack_index=str(tmp_path / "index"), epochs=1)
    with caplog.at_level(logging.WARNING):
        index = prepack(config, MODEL, SEED, 2, progress=False)
    (rare,) = (row for row in planned_rows(index) if row.source == "rare")
    assert rare.row >= 20 and " for rare/rare.parquet/" in rare.sample.sample_id
    lines = unusable_lines(index)
    assert sum(len(line["substitutes"]) for line in lines) == 1 == index.counts["substituted"]
    assert len(lines) == index.counts["unusable"] > 1  # those met on the way are named too
    assert len([r for r in caplog.records if r.message.startswith("unusable row")]) == len(lines)


def test_a_source_without_a_usable_row_is_an_error(config: DataConfig, tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["a", "b"], "image_bytes": [b"x", b"y"]}), tmp_path / "bad.parquet")
    bad = replace(config.sources[0], name="bad", path=str(tmp_path / "bad.parquet"))
    config = replace(config, sources=(config.sources[0], bad), pack_index=str(tmp_path / "index"))
    with pytest.raises(DataSetError, match="data.sources bad: none of its 2 rows can be used; the first: bad/bad.parq"):
        prepack(config, MODEL, SEED, 2, progress=False)
    assert not (tmp_path / "index").exists()


def test_sample_longer_than_a_pack_is_reported(config: DataConfig, tmp_path: Path) -> None:
    sources = tuple(source for source in config.sources if source.name in ("text2image", "interleave_subject"))
    config = replace(config, sources=sources, seq_length=800, pack_index=str(tmp_path / "index"))
    index = prepack(config, MODEL, SEED, 2, progress=False)
    lines = unusable_lines(index)
    assert ["exceed data.seq_length 800" in line["cause"] for line in lines] == [True]
    assert max(index.pack(n).pack.length for n in range(len(index))) <= 800
    shorter = replace(config, seq_length=1100, max_sample_length=800, pack_index=str(tmp_path / "shorter"))
    bounded = prepack(replace(shorter, facts=f"{tmp_path}/index.facts"), MODEL, SEED, 2, progress=False)
    assert ["exceed data.max_sample_length 800" in line["cause"] for line in unusable_lines(bounded)] == [True]
    assert max(row.sample.length for row in planned_rows(bounded)) <= 800
    assert max(bounded.pack(n).pack.length for n in range(len(bounded))) > 800
    shutil.rmtree(tmp_path / "shorter")
    with pytest.raises(DataSetError, match="none of its [0-9]+ rows .* exceed data.seq_length 10"):
        prepack(replace(config, seq_length=10, pack_index=str(tmp_path / "none")), MODEL, SEED, 2, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "index.facts", "none.facts"]


def test_existing_folder_needs_force(config: DataConfig, index: PackIndex, tmp_path: Path) -> None:
    with pytest.raises(PackIndexError, match="exists; give --force"):
        prepack(config, MODEL, SEED, 2, progress=False)
    (tmp_path / "mine").mkdir()
    with pytest.raises(PackIndexError, match="is no pack index"):
        prepack(replace(config, pack_index=str(tmp_path / "mine")), MODEL, SEED, 2, force=True, progress=False)
    small = replace(config, sources=config.sources[:1], pack_index=str(tmp_path / "index"))
    prepack(small, MODEL, SEED, 2, progress=False)
    assert prepack(replace(small, epochs=1), MODEL, SEED, 2, force=True, progress=False).counts["samples"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "index.facts", "mine"]


def test_wrong_settings_are_named(config: DataConfig, tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"caption": pa.array([], pa.string()), "image_bytes": pa.array([], pa.binary())}),
        tmp_path / "empty.parquet",
    )
    empty = replace(config.sources[0], name="empty", path=str(tmp_path / "empty.parquet"))
    config = replace(config, pack_index=str(tmp_path / "index"))
    for wrong, error, message in (
        (replace(config, sources=()), ConfigError, "data.sources: is empty"),
        (replace(config, sources=config.sources[:1] * 2), ConfigError, "'text2image' stands 2 times"),
        (replace(config, frame_sampling="all"), ConfigError, "data.frame_sampling 'all'"),
        (replace(config, sources=(replace(empty, path=str(tmp_path)),)), ConfigError, "lies in the folder of"),
        (replace(config, sources=(empty,)), DataSetError, "empty.parquet has no rows"),
    ):
        with pytest.raises(error, match=message):
            prepack(wrong, MODEL, SEED, 2, progress=False)
    with pytest.raises(TokenizerError, match="model.vocab_size 100: the tokenizer has 498 tokens"):
        prepack(config, replace(MODEL, vocab_size=100), SEED, 2, progress=False)


def test_mismatch_names_both_hashes_and_what_differs(config: DataConfig, index: PackIndex) -> None:
    files = {source.name: RecordReader(source).files for source in config.sources}
    digest = Tokenizer(config.tokenizer).sha256
    index.check(shaping_values(config, files, digest, SEED, MODEL))
    moved = replace(config, pack_index="elsewhere", decode="mixed", decode_threads=9)
    index.check(shaping_values(moved, files, digest, SEED, MODEL))
    other = replace(config, vae_resolution=480, prompts=PromptConfig(captioning="Say."))
    with pytest.raises(PackIndexError) as caught:
        index.check(shaping_values(other, files, digest, SEED + 1, MODEL))
    message = str(caught.value)
    assert index.hash in message and "the run has" in message
    assert "data.vae_resolution: index has 256, run has 480" in message
    assert "data.prompts.captioning" in message and "seed: index has 11, run has 12" in message
    assert "decode" not in message


def test_absent_damaged_and_newer_index(index: PackIndex, tmp_path: Path) -> None:
    with pytest.raises(PackIndexError, match="holds no index.json; run tools/prepack.py"):
        PackIndex.open(tmp_path)
    for name in ("index.json", "packs.arrow", "samples.arrow"):
        (tmp_path / name).write_bytes((index.folder / name).read_bytes())
    header = json.loads((tmp_path / INDEX_FILE).read_text())
    for change, message in (
        ({"version": VERSION + 1}, f"has version {VERSION + 1}, this program reads {VERSION}; update this program"),
        ({"hash": "0" * 16}, "is damaged"),
        ({"counts": {**header["counts"], "samples": 1}}, "samples, index.json says 1"),
    ):
        (tmp_path / INDEX_FILE).write_text(json.dumps({**header, **change}))
        with pytest.raises(PackIndexError, match=message):
            PackIndex.open(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps(header))
    (tmp_path / "packs.arrow").write_bytes(b"ARROW1")
    with pytest.raises(PackIndexError, match="is damaged"):
        PackIndex.open(tmp_path)


def run_tool(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_command_lines(config: DataConfig, tmp_path: Path) -> None:
    source = config.sources[0]
    (tmp_path / "run.yaml").write_text(
        f"data:\n  sources:\n  - {{name: {source.name}, path: '{source.path}', task: {source.task}}}\n"
        f"  tokenizer: '{config.tokenizer}'\n  vae_resolution: 256\n  vit_resolution: 224\n  seq_length: 1000\n"
    )
    folder = str(tmp_path / "index")
    made = run_tool("prepack", "--config", str(tmp_path / "run.yaml"), f"data.pack_index={folder}", "--quiet")
    assert made.returncode == 0, made.stderr
    assert "6 samples" in made.stdout and PackIndex.open(folder).hash in made.stdout
    again = run_tool("prepack", "--config", str(tmp_path / "run.yaml"), f"data.pack_index={folder}", "--quiet")
    assert again.returncode == 2 and "give --force" in again.stderr and "Traceback" not in again.stderr
    shown = run_tool("inspect_pack", folder, "--pack", "0", "1")
    assert shown.returncode == 0, shown.stderr
    assert "pack 0:" in shown.stdout and "pack 1:" in shown.stdout and "noise" in shown.stdout
    assert run_tool("inspect_pack", str(tmp_path)).returncode == 2
