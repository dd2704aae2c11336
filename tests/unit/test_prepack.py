"""Prepack at scale: facts found out once, rows held out, every task planned, steps formed together."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import DataConfig, ModelConfig, SourceConfig
from megatron_lance.data import collect, facts, pack_index, pack_index_format
from megatron_lance.data.loader import PackReader
from megatron_lance.data.media import MediaInfo, probe
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.pack_index_format import PackIndexError
from megatron_lance.data.prepack import is_held_out, prepack
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.records import DataSetError
from tests.tiny import TASKS, jpeg, mp4, tables, write_table, write_tokenizer

MODEL = ModelConfig(vocab_size=512, latent_position_frames=9, latent_position_size=32)
SEED = 5


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Three sources of 4 rows, each a folder with one file."""
    for name, columns in tables().items():
        write_table(tmp_path / "data" / name / "a.parquet", columns)
    return DataConfig(
        sources=tuple(SourceConfig(n, str(tmp_path / "data" / n), t) for n, t in TASKS.items()),
        pack_index=str(tmp_path / "index"),
        tokenizer=str(write_tokenizer(tmp_path / "tokenizer")),
        seq_length=512,
        vae_resolution=64,
        vit_resolution=56,
        max_seconds_generation=1.5,
    )


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of everything that is probed."""
    sizes: list[int] = []

    def counting(data: bytes) -> MediaInfo:
        sizes.append(len(data))
        return probe(data)

    monkeypatch.setattr(facts, "probe", counting)
    yield sizes


def plan(config: DataConfig, **changes: Any) -> PackIndex:
    options = {key: changes.pop(key) for key in ("workers", "held_out", "global_batch_size") if key in changes}
    packs = options.pop("global_batch_size", 2)
    return prepack(replace(config, **changes), MODEL, SEED, packs, force=True, progress=False, **options)


def rows_of(index: PackIndex) -> list[tuple[str, str, int]]:
    return sorted((r.source, r.file, r.row) for n in range(len(index)) for r in index.pack(n).rows)


def test_planning_again_probes_nothing(config: DataConfig, probed: list[int], tmp_path: Path) -> None:
    plan(config)
    assert len(probed) == 12
    again = plan(
        config,
        seq_length=700,
        vae_resolution=96,
        vit_resolution=84,
        epochs=2,
        caption_dropout=0.5,
        pack_index=str(tmp_path / "other"),
        facts=str(tmp_path / "index.facts"),
    )
    assert len(probed) == 12 and again.counts["samples"] == 24


def test_an_index_is_of_one_dropout_scheme(config: DataConfig) -> None:
    every = replace(config, caption_dropout=0.0, condition_dropout=1.0)
    paper, release = plan(every, dropout_scheme="paper", pack_index=f"{config.pack_index}2"), plan(every)
    assert paper.hash != release.hash

    def dropped(index: PackIndex) -> set[bool]:
        rows = [row for number in range(len(index)) for row in index.pack(number).rows]
        return {row.dropout.caption for row in rows if row.sample.task.is_generation}

    assert (dropped(paper), dropped(release)) == ({True}, {False})
    with pytest.raises(PackIndexError, match="data.dropout_scheme: index has 'release', run has 'paper'"):
        release.check({**release.shaping, "data": {**release.shaping["data"], "dropout_scheme": "paper"}})


def test_a_new_shard_costs_itself_and_a_changed_one_too(config: DataConfig, probed: list[int], tmp_path: Path) -> None:
    plan(config)
    probed.clear()
    shard = tmp_path / "data" / "text2image" / "b.parquet"
    write_table(shard, {"caption": ["one more", "and another"], "image_bytes": [jpeg("red"), jpeg("blue")]})
    assert plan(config).counts["samples"] == 14
    assert len(probed) == 2
    write_table(shard, {"caption": ["one less"], "image_bytes": [jpeg("red")]})
    assert plan(config).counts["samples"] == 13
    assert len(probed) == 3


def test_what_could_not_be_read_is_looked_at_again(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is not lost to all later plans because storage failed while it was probed; one whose file is gone is."""
    folder = tmp_path / "data" / "references"
    write_table(folder / "a.parquet", {"caption": ["x", "y", "z"], "image_bytes": ["a.jpg", "b.jpg", "gone.jpg"]})
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(jpeg("red"))
    sources = (SourceConfig("references", str(folder), "t2i", raw_bytes_input=False),)
    cat_file = LocalFileSystem.cat_file

    def failing(self: LocalFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        if path.endswith("b.jpg"):
            raise OSError(errno.EIO, "Input/output error")
        return cat_file(self, path, *args, **kwargs)

    with monkeypatch.context() as failure:
        failure.setattr("megatron_lance.data.remote.FIRST_WAIT", 0.001)
        failure.setattr(LocalFileSystem, "cat_file", failing)
        assert plan(config, sources=sources).counts["unusable"] == 2
    assert plan(config, sources=sources).counts["unusable"] == 1
    monkeypatch.setattr(facts, "row_facts", None)  # and then never again
    assert plan(config, sources=sources, seq_length=480).counts["unusable"] == 1


def test_a_shard_without_rows_is_passed_over(config: DataConfig, tmp_path: Path) -> None:
    expected = rows_of(plan(config))
    columns = {name: values[:0] for name, values in tables()["text2image"].items()}
    write_table(tmp_path / "data" / "text2image" / "empty.parquet", columns)
    assert rows_of(plan(config)) == expected


def test_what_a_killed_process_left_is_no_hindrance(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / f".index.partial-{os.getpid()}").mkdir()
    assert len(plan(config))
    (tmp_path / "file").write_text("")
    with pytest.raises(PackIndexError, match=r"pack_index '\S+/file/index': cannot be written \(Not a dir"):
        plan(config, pack_index=str(tmp_path / "file" / "index"), facts=str(tmp_path / "facts"))
    with pytest.raises(UserError, match=r"data.facts '\S+/file/facts': cannot be written \(Not a directory\)"):
        plan(config, facts=str(tmp_path / "file" / "facts"))


def test_a_copy_is_of_the_same_index_or_none(config: DataConfig) -> None:
    copy = pickle.dumps(plan(config))
    assert rows_of(pickle.loads(copy)) == rows_of(plan(config))
    plan(config, epochs=2)
    with pytest.raises(PackIndexError, match=r"has hash \w+, the run began with \w+; it was written anew: start"):
        pickle.loads(copy)


def test_a_damaged_facts_file_is_made_again(config: DataConfig, probed: list[int], tmp_path: Path) -> None:
    index = plan(config)
    victim = sorted((tmp_path / "index.facts").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:100])
    again = plan(config)
    assert len(probed) == 16
    assert [again.pack(n) for n in range(len(again))] == [index.pack(n) for n in range(len(index))]


def test_processes_find_the_same(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = plan(config)
    monkeypatch.setattr(collect, "_ROWS", 2)
    other = plan(config, workers=2, facts=str(tmp_path / "facts"), pack_index=str(tmp_path / "other"))
    assert other.hash == index.hash
    assert [other.pack(n) for n in range(len(other))] == [index.pack(n) for n in range(len(index))]
    # What is in a facts file does not depend on who found it out.
    found = {folder: sorted((tmp_path / folder).iterdir()) for folder in ("facts", "index.facts")}
    assert [p.name for p in found["facts"]] == [p.name for p in found["index.facts"]]


def test_samples_over_several_record_batches(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [plan(config).pack(n) for n in range(len(plan(config)))]
    for module in (pack_index, pack_index_format):
        monkeypatch.setattr(module, "BATCH", 2)
    index = plan(config)
    assert [index.pack(n) for n in range(len(index))] == expected


def test_rows_of_any_place_fsspec_knows(config: DataConfig, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in TASKS:
        memory.pipe(f"/prepack/{name}/a.parquet", (tmp_path / "data" / name / "a.parquet").read_bytes())
    expected = rows_of(plan(config))
    for form in ("memory://prepack/{}", "memory://prepack/{}/*.parquet"):
        sources = tuple(replace(s, path=form.format(s.name)) for s in config.sources)
        assert rows_of(plan(config, sources=sources)) == expected


def test_held_out_rows_are_never_trained_on(config: DataConfig, tmp_path: Path) -> None:
    everything = rows_of(plan(config))
    training = plan(config, validation_fraction=0.3, epochs=3)
    validation = plan(config, validation_fraction=0.3, held_out=True, pack_index=str(tmp_path / "validation"))
    assert set(rows_of(training)) | set(rows_of(validation)) == set(everything)
    assert not set(rows_of(training)) & set(rows_of(validation))
    assert len(rows_of(validation)) == len(set(rows_of(validation)))
    # The hash of its own name decides about a row: more data changes nothing about the rows there were.
    shutil.copy(tmp_path / "data" / "text2image" / "a.parquet", tmp_path / "data" / "text2image" / "b.parquet")
    more = plan(config, validation_fraction=0.3, held_out=True, pack_index=str(tmp_path / "more"))
    assert [row for row in rows_of(more) if row[1] == "a.parquet"] == rows_of(validation)
    held = sum(is_held_out("file", row, 0.1) for row in range(20_000))
    assert held / 20_000 == pytest.approx(0.1, abs=0.01)


def test_a_row_that_two_sources_share_is_held_out_of_both(config: DataConfig, tmp_path: Path) -> None:
    """The public text2video files serve t2v and i2v."""
    clips = next(source for source in config.sources if source.task in ("t2v", "i2v"))
    write_table(Path(clips.path) / "b.parquet", tables()["text2video"])
    both = replace(config, sources=(replace(clips, name="x", task="t2v"), replace(clips, name="y", task="i2v")))
    training = plan(both, validation_fraction=0.5)
    validation = plan(both, validation_fraction=0.5, held_out=True, pack_index=str(tmp_path / "validation"))
    trained, held = ({row[1:] for row in rows_of(index)} for index in (training, validation))
    assert trained and held and not trained & held


def test_validation_rows_cannot_be_trained_on_by_mistake(config: DataConfig) -> None:
    config = replace(config, validation_fraction=0.3)
    index = plan(config, held_out=True)
    with pytest.raises(PackIndexError, match="held_out: index has True, run has False"):
        PackReader(config, index, Tokenizer(config.tokenizer), SEED, MODEL)
    with pytest.raises(DataSetError, match="data.validation_fraction 0.999 leaves none of its 4 rows for training"):
        plan(config, validation_fraction=0.999)


def test_text_alone_interleaved_questions_and_several_references(config: DataConfig, tmp_path: Path) -> None:
    """Each is planned, and what is read later is what was planned."""
    red, blue, clip = jpeg("red"), jpeg("blue"), mp4("green")
    chat = {"caption_i": ["Be brief.", ""], "caption_q": ["Why?", "Who are you?"], "caption_a": ["So.", "A model."]}
    tables: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": ("t2t", chat),
        "compare": (
            "v2t",
            {
                "interleave_array": [[b"Is", red, b"in", clip, b"or", blue, b"?", b"In the clip."]],
                "element_dtype_array": [["text", "image", "text", "video", "text", "image", "text", "text"]],
            },
        ),
        "subjects": (
            "s2v",
            {
                "interleave_array": [[red, blue, jpeg("green"), b"all three together", clip]],
                "element_dtype_array": [["image", "image", "image", "text", "video"]],
            },
        ),
    }
    sources = []
    for name, (task, columns) in tables.items():
        path = write_table(tmp_path / "more" / f"{name}.parquet", columns)
        sources.append(SourceConfig(name, str(path), task))
    config = replace(config, sources=tuple(sources), caption_dropout=0.0, condition_dropout=0.0)
    index = plan(config)
    assert index.counts["unusable"] == 0
    samples = {row.sample.sample_id: row.sample for n in range(len(index)) for row in index.pack(n).rows}
    kinds = {name: [str(s.kind) for s in sample.segments] for name, sample in samples.items()}
    assert kinds["chat/chat.parquet/0"] == kinds["chat/chat.parquet/1"] == ["text"]
    assert kinds["compare/compare.parquet/0"] == ["text", *["vit", "text"] * 3]
    assert kinds["subjects/subjects.parquet/0"] == ["text", *["vit", "clean"] * 3, "text", "noise", "text"]
    reader = PackReader(config, index, Tokenizer(config.tokenizer), SEED, MODEL)
    for number in range(len(index)):
        assert reader.tokens(number).token_ids.numel() == index.pack(number).pack.length


def test_the_global_batch_shapes_an_index_but_another_may_read_it(config: DataConfig, tmp_path: Path) -> None:
    two = plan(config, epochs=20)
    four = plan(config, epochs=20, global_batch_size=4, pack_index=str(tmp_path / "four"))
    assert two.hash != four.hash and Counter(rows_of(two)) == Counter(rows_of(four))
    config = replace(config, epochs=20)
    for index in (two, four):
        PackReader(config, index, Tokenizer(config.tokenizer), SEED, MODEL)
    linear = four.shaping["model"]["token_cost"]
    for number in range(8):
        pack = four.pack(number)
        assert pack.cost == pack.mask_pairs + round(linear * pack.pack.length)


def test_an_index_is_small_and_read_in_place(config: DataConfig, tmp_path: Path) -> None:
    index = plan(config, epochs=200)
    files = [tmp_path / "index" / name for name in ("packs.arrow", "samples.arrow")]
    assert sum(path.stat().st_size for path in files) / index.counts["samples"] < 200  # bytes
    header = json.loads((tmp_path / "index" / "index.json").read_text())
    assert header["counts"]["epochs"] == 200
