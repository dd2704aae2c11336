"""The demo's data set and its judge: every task readable, nothing held out in training, pixels judged as drawn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from megatron_lance.config.errors import UserError
from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.config.validate import validate
from megatron_lance.data.media import probe, read_frames
from megatron_lance.data.prepack import prepack
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.records import Media, RecordReader
from megatron_lance.encoders.vae import BlockTransformCodec
from megatron_lance.packing.rng import stream
from tests.shared import REPOSITORY
from tools import make_demo_data
from tools.demo_shapes import (
    CLIP_TEMPLATES,
    COLOURS,
    DIRECTIONS,
    NONE,
    PICTURE_TEMPLATES,
    POSITIONS,
    SHAPES,
    Scene,
    caption,
    chance,
    correct,
    draw,
    judge,
    random_scene,
)

PICTURES, CLIPS = 60, 20
CONFIG = REPOSITORY / "examples" / "configs" / "demo.yaml"
CAPTIONS = ("text2image", "text2video")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set where the demo's configuration looks for it, below a working directory of its own."""
    out = tmp_path_factory.mktemp("demo") / "runs" / "demo" / "data"
    assert make_demo_data.main([str(out), f"--pictures={PICTURES}", f"--clips={CLIPS}", "--quiet"]) == 0
    return out


@pytest.fixture
def config(data: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(data.parents[2])
    return load_config([str(CONFIG)], ["data.epochs=1"])


def scenes(moves: bool, count: int) -> list[Scene]:
    return [random_scene(stream(7, "test", i), moves) for i in range(count)]


def through_codec(pixels: np.ndarray, codec: BlockTransformCodec) -> np.ndarray:
    """Floats in 0..1."""
    latents = codec.encode(torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1)
    return np.asarray((codec.decode(latents).permute(1, 2, 3, 0) + 1) / 2)


@pytest.mark.parametrize(("moves", "count"), [(False, 120), (True, 40)])
def test_judge_is_right_on_drawn_and_on_decoded_samples(moves: bool, count: int) -> None:
    codec = BlockTransformCodec(48)
    drawn, decoded = Counter[str](), Counter[str]()
    for scene in scenes(moves, count):
        pixels = draw(scene, 64)
        drawn += Counter(name for name, right in correct(judge(pixels), scene.attributes).items() if right)
        verdict = judge(through_codec(pixels, codec))
        decoded += Counter(name for name, right in correct(verdict, scene.attributes).items() if right)
        assert all(0 <= guess.confidence <= 1 for guess in verdict.values())
    for right in (drawn, decoded):
        assert set(right) == {"colour", "shape", "direction" if moves else "position", "all"}
        assert min(right.values()) >= 0.97 * count


@pytest.mark.parametrize("frames", [1, 9])
def test_judge_sees_nothing_in_noise_and_plain_frames(frames: int) -> None:
    noise = stream(3, "test").random((frames, 64, 64, 3))
    for pixels in (noise, np.full((frames, 64, 64, 3), 200, np.uint8)):
        assert {guess.name for guess in judge(pixels).values()} == {NONE}


def test_judge_is_not_right_by_accident() -> None:
    """Random latents look like something now and then, but agree with a caption no more often than chance."""
    codec, asked = BlockTransformCodec(48), scenes(False, 150)
    right = Counter[str]()
    for scene in asked:
        latents = stream(5, "test", str(scene)).standard_normal((1, 4, 4, 48), dtype=np.float32)
        pixels = np.asarray((codec.decode(torch.from_numpy(latents)).permute(1, 2, 3, 0) + 1) / 2)
        right += Counter(name for name, hit in correct(judge(pixels), scene.attributes).items() if hit)
    assert all(right[name] <= len(asked) * level + 3 for name, level in chance(False).items())


def test_judge_refuses_what_are_no_frames() -> None:
    with pytest.raises(ValueError, match=r"must be \[T, H, W, 3\]"):
        judge(np.zeros((64, 64, 3)))
    with pytest.raises(ValueError, match="not finite"):
        judge(np.full((1, 64, 64, 3), np.nan))


def test_chance_levels() -> None:
    assert chance(False) == pytest.approx({"colour": 1 / 6, "shape": 1 / 3, "position": 1 / 5, "all": 1 / 90})
    assert chance(True) == pytest.approx({"colour": 1 / 6, "shape": 1 / 3, "direction": 1 / 4, "all": 1 / 72})


def test_every_row_is_a_record_with_media_of_its_kind(config: RunConfig) -> None:
    assert {source.task for source in config.data.sources} == set("t2i t2v i2v i_edit v_edit s2i i2t v2t".split())
    for source in config.data.sources:
        reader = RecordReader(source)
        [file] = reader.files
        for row in range(reader.footer(file.name).rows):
            record = reader.record(file.name, row)
            media = [m for m in (*record.inputs, record.target) if isinstance(m, Media)]
            assert len(media) == (2 if source.task in ("i_edit", "v_edit", "s2i") else 1)
            for m in media:
                info = probe(reader.media(file.name, row, m.element))
                clip = (9, 12.0) if m.kind == "video" else (1, 0.0)
                assert (info.kind, info.width, info.height, info.n_frames, info.average_fps) == (m.kind, 64, 64, *clip)


def test_files_show_what_their_captions_say(data: Path) -> None:
    for name, moves, column in (("text2image", False, "image_bytes"), ("text2video", True, "video_bytes")):
        for row in pq.read_table(data / f"{name}.parquet").slice(0, 20).to_pylist():
            frames = tuple(range(9)) if moves else (0,)
            verdict = judge(read_frames(row[column], frames))
            words = row["caption"].lower().rstrip(".").split()
            assert all(guess.name in words for guess in verdict.values()), (row["caption"], verdict)


def captions(moves: bool, held_out: bool) -> set[str]:
    """All sentences for trained or held-out combinations."""
    templates = range(len(CLIP_TEMPLATES if moves else PICTURE_TEMPLATES))
    every = [
        Scene(colour, shape, place, moves, 0.15, (0.0, 0.0), (230, 230, 230))
        for colour in COLOURS
        for shape in SHAPES
        for place in (DIRECTIONS if moves else POSITIONS)
    ]
    return {caption(scene, template) for scene in every if scene.held_out == held_out for template in templates}


@pytest.mark.parametrize("moves", [False, True])
def test_held_out_combinations_are_absent_from_training(data: Path, moves: bool) -> None:
    trained, held_out = captions(moves, held_out=False), captions(moves, held_out=True)
    assert len(held_out) == 18 * 4 and not trained & held_out
    found = set(pq.read_table(data / f"{CAPTIONS[moves]}.parquet")["caption"].to_pylist())
    assert found <= trained
    answers = pq.read_table(data / ("x2t_video.parquet" if moves else "x2t_image.parquet"))["caption_a"].to_pylist()
    assert not set(answers) & held_out
    for i in range(200):
        scene = make_demo_data.edit(stream(1, "test", i), moves, held_out=False)[2]
        assert not scene.held_out
        assert not make_demo_data.reference(stream(1, "test", i), held_out=False)[2].held_out


def heldout_rows(data: Path, name: str = "heldout") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


def test_held_out_prompts(data: Path) -> None:
    rows = heldout_rows(data)
    tasks = Counter(row["task"] for row in rows)
    assert set(tasks) == {"t2i", "t2v", "i2v", "i_edit", "v_edit", "s2i", "i2t", "v2t"}
    assert len(rows) >= 96 and tasks["t2i"] >= 64
    for row in rows:
        asks = row["task"] in ("i2t", "v2t")
        assert set(row["expected"]) == (
            {"answer"}
            if asks
            else {"colour", "shape", "direction" if row["task"].endswith(("2v", "v_edit")) else "position"}
        )
        assert len(row["media"]) == (0 if row["task"] in ("t2i", "t2v") else 1)
        for path in row["media"]:
            kind = "video" if row["task"] in ("v_edit", "v2t") else "image"
            assert probe((data / path).read_bytes()).kind == kind
    for task, moves in (("t2i", False), ("t2v", True)):
        assert {row["caption"] for row in rows if row["task"] == task} <= captions(moves, held_out=True)


def test_prompts_to_preview(data: Path) -> None:
    rows, shown = heldout_rows(data), heldout_rows(data, "preview")
    assert Counter(row["task"] for row in shown) == {
        task: 3 if task == "t2i" else 1 for task in dict.fromkeys(r["task"] for r in rows)
    }
    assert all(row in rows for row in shown)


def test_same_arguments_same_bytes(data: Path, tmp_path: Path) -> None:
    make_demo_data.make(tmp_path / "again", 1, PICTURES, CLIPS, make_demo_data.Look(), progress=False)
    make_demo_data.make(tmp_path / "other", 2, PICTURES, CLIPS, make_demo_data.Look(), progress=False)
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert len(files) > 100
    for name in files:
        if name.suffix == ".parquet":
            first, again, other = (
                pq.read_table(root / name) for root in (data, tmp_path / "again", tmp_path / "other")
            )
            assert first.equals(again) and not first.equals(other)
        else:
            assert (data / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_variety_is_of_what_captions_do_not_name() -> None:
    scenes = [random_scene(stream(1, "test", i), moves=bool(i % 2)) for i in range(40)]
    for scene in scenes:
        assert np.array_equal(make_demo_data.Look().pixels(scene), draw(scene, 64))
        calm = scene.calmed(0.0)
        assert calm.attributes == scene.attributes and calm.offset == (0.0, 0.0)
        assert np.isclose(scene.calmed(0.5).radius - 0.2, 0.5 * (scene.radius - 0.2))
    assert len({(s.calmed(0.0).radius, s.calmed(0.0).background) for s in scenes}) == 1


def test_tokenizer_loads_and_round_trips(data: Path) -> None:
    ours, theirs = Tokenizer(data / "tokenizer"), AutoTokenizer.from_pretrained(data / "tokenizer")
    assert ours.size <= 512 and len(theirs) == ours.size
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>"
    assert theirs.convert_tokens_to_ids("<|video_pad|>") == ours.video_pad
    for text in (
        "A red circle on the left.",
        "Mirror it.",
        "schräg, 猫 \n\t<",
        *(row["caption"] for row in heldout_rows(data)),
    ):
        ids = theirs.encode(text, add_special_tokens=False)
        assert theirs.decode(ids) == text and ours.decode(ids) == text
    for word in [*COLOURS, *SHAPES, *POSITIONS, *DIRECTIONS]:
        assert len(theirs.encode(f" {word}", add_special_tokens=False)) == 1


def test_configuration_packs_every_row(config: RunConfig) -> None:
    validate(config, world_size=2)
    assert config.data.prompts == make_demo_data.PROMPTS
    index = prepack(config.data, config.model, config.training.seed, config.training.global_batch_size, progress=False)
    assert index.counts["unusable"] == 0
    samples = [sample for number in range(len(index)) for sample in index.pack(number).pack.samples]
    assert {str(sample.task) for sample in samples} == {source.task for source in config.data.sources}
    assert max(sample.length for sample in samples) < 160


def test_refuses_a_folder_that_is_not_empty_and_odd_arguments(data: Path, tmp_path: Path) -> None:
    before = (data / "text2image.parquet").read_bytes()
    with pytest.raises(UserError, match="is not empty; name another folder or give --force"):
        make_demo_data.main([str(data), "--quiet"])
    assert (data / "text2image.parquet").read_bytes() == before
    (tmp_path / "file").write_text("x")
    for arguments, message in (
        ([str(tmp_path / "file")], "is a file; name a folder"),
        ([str(tmp_path / "new"), "--size=40"], "must be a multiple of 16 pixels"),
        ([str(tmp_path / "new"), "--pictures=0"], "--pictures 0: must be positive"),
        ([str(tmp_path / "new"), "--variety=1.5"], "--variety 1.5: must lie in"),
    ):
        with pytest.raises(UserError, match=message):
            make_demo_data.main(arguments)
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("kept")
    forced = [str(tmp_path / "full"), "--force", "--quiet", "--pictures=4", "--clips=4"]
    assert make_demo_data.main(forced) == 0
    assert (tmp_path / "full" / "notes.txt").read_text() == "kept"
