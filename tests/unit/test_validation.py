"""Validation and previews on one rank: what they report, and that training does not feel them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prepack import is_held_out
from megatron_lance.objectives.losses import LossCounts
from megatron_lance.packing.sample import Task
from megatron_lance.training.watchdog import Watchdog
from tests.command import Commander
from tests.tiny import PROMPTS, TinyRun, make_tiny_run, tables, with_validation

OF_TRAINING = ("loss", "ce_loss", "velocity_loss", "loss_by_task", "grad_norm", "learning_rate")
OF_VALIDATION = ("loss", "ce_loss", "velocity_loss", "loss_by_task", "packs", "broken")


@pytest.fixture(scope="module")
def held(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny run with half of its rows held out, validated and previewed every second step."""
    return with_validation(tiny_run, tmp_path_factory.mktemp("validation") / "run")


@pytest.fixture
def train(held: TinyRun) -> str:
    return f"train --config {held.config} training.precision=float32 training.log_interval=1"


def read(run_dir: Path, name: str) -> list[Any]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def only(lines: list[Any], names: tuple[str, ...]) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in names) for line in lines]


def test_the_rows_are_those_training_never_sees(held: TinyRun) -> None:
    run = held.load()
    for folder, expected in ((run.data.pack_index, False), (run.validation.pack_index, True)):
        index = PackIndex.open(folder)
        rows = {(row.file, row.row) for number in range(len(index)) for row in index.pack(number).rows}
        assert rows and {is_held_out(*row, 0.5) for row in rows} == {expected}


def test_training_is_bit_identical_with_and_without(
    command: Commander, train: str, held: TinyRun, tmp_path: Path
) -> None:
    steps = "training.train_iters=5 training.ema_decay=0.9 optimizer.lr=0.01"
    looks = f"preview.prompts={held.folder}/prompts.jsonl"
    for name, options in {
        "alone": "validation.pack_index=''",
        "looked": looks,
        "average": f"{looks} validation.ema=true preview.ema=true",
    }.items():
        done = command(f"{train} {steps} {options} training.run_dir={name}", folder=tmp_path)
        assert done.code == 0, done.err
        assert only(read(tmp_path / name, "metrics"), OF_TRAINING) == only(
            read(tmp_path / "alone", "metrics"), OF_TRAINING
        )
    assert read(tmp_path / "alone", "validation") == [] == read(tmp_path / "alone", "preview")
    looked, average = (read(tmp_path / name, "validation") for name in ("looked", "average"))
    assert [line["step"] for line in looked] == [2, 4, 5] == [line["step"] for line in average]
    assert looked[0]["loss"] != average[0]["loss"] and not looked[0]["averaged"] and average[0]["averaged"]


def test_the_figures_are_of_fixed_rows_noise_and_timesteps(
    command: Commander, train: str, held: TinyRun, tmp_path: Path
) -> None:
    """Weights that stand still give the same figures at every step, and the index says of how many packs and tasks."""
    done = command(f"{train} training.train_iters=4 training.run_dir=run optimizer.lr=0", folder=tmp_path)
    assert done.code == 0, done.err
    lines = read(tmp_path / "run", "validation")
    assert [line["step"] for line in lines] == [2, 4]
    assert only(lines[:1], OF_VALIDATION) == only(lines[1:], OF_VALIDATION)
    index = PackIndex.open(held.load().validation.pack_index)
    assert lines[0]["packs"] == len(index) > 1
    assert set(lines[0]["loss_by_task"]) == {"t2i", "t2v", "i2t"}
    counts = LossCounts.of(index.pack(number).pack for number in range(len(index)))
    rows = dict(zip(map(str, Task), counts.by_task, strict=True))
    velocity = sum(lines[0]["loss_by_task"][task] * rows[task] for task in ("t2i", "t2v")) / counts.velocity
    assert lines[0]["velocity_loss"] == pytest.approx(velocity, rel=1e-6)
    assert lines[0]["ce_loss"] == pytest.approx(lines[0]["loss_by_task"]["i2t"], rel=1e-6)
    objective = held.load().objective
    total = objective.ce_weight * lines[0]["ce_loss"] + objective.mse_weight * lines[0]["velocity_loss"]
    assert lines[0]["loss"] == pytest.approx(total, rel=1e-6)
    assert "validation after step 2: loss " in done.err
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    shown = {event.step: event.value for event in board.Scalars("validation/loss/t2v")}
    assert shown == pytest.approx({line["step"]: line["loss_by_task"]["t2v"] for line in lines})


def test_after_a_restart_the_figures_are_the_same(command: Commander, train: str, tmp_path: Path) -> None:
    """Also where a kill came between a save and the validation after it."""
    whole = command(f"{train} training.train_iters=6 training.run_dir=whole", folder=tmp_path)
    first = command(f"{train} training.train_iters=4 training.run_dir=run", folder=tmp_path)
    assert (whole.code, first.code) == (0, 0), whole.err
    path = tmp_path / "run" / "validation.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + lines[-1][:20], encoding="utf-8")
    again = command(f"{train} training.train_iters=6 training.run_dir=run training.resume=latest", folder=tmp_path)
    assert again.code == 0, again.err
    found, expected = (read(tmp_path / name, "validation") for name in ("run", "whole"))
    assert [line["step"] for line in found] == [2, 4, 6]
    assert only(found, OF_VALIDATION) == only(expected, OF_VALIDATION)


def test_no_pack_is_begun_once_the_time_is_up(command: Commander, train: str, held: TinyRun, tmp_path: Path) -> None:
    limits = f"validation.max_seconds=1e-9 preview.max_seconds=1e-9 preview.prompts={held.folder}/prompts.jsonl"
    done = command(f"{train} training.train_iters=1 training.run_dir=run {limits}", folder=tmp_path)
    assert done.code == 0, done.err
    assert [line["packs"] for line in read(tmp_path / "run", "validation")] == [1]
    (preview,) = read(tmp_path / "run", "preview")
    assert (preview["samples"], preview["prompts"]) == (3, len(PROMPTS)), "one batch"
    assert "validation: ended by validation.max_seconds 1e-09 or a stop after 1 of " in done.err
    assert f"preview: ended by preview.max_seconds 1e-09 or a stop after 3 of {len(PROMPTS)} prompts" in done.err


def test_fewer_packs_than_there_are(command: Commander, train: str, tmp_path: Path) -> None:
    done = command(f"{train} training.train_iters=1 training.run_dir=run validation.packs=2", folder=tmp_path)
    assert done.code == 0, done.err
    assert [line["packs"] for line in read(tmp_path / "run", "validation")] == [2]


def test_prompts_of_every_task_are_shown(command: Commander, train: str, held: TinyRun, tmp_path: Path) -> None:
    """Pictures, clips as animations, answers as text; the same samples as the command line's."""
    options = f"preview.prompts={held.folder}/prompts.jsonl training.run_dir=run training.train_iters=2"
    done = command(f"{train} {options}", folder=tmp_path)
    assert done.code == 0, done.err
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    pictures = {tag: board.Images(tag)[-1] for tag in board.Tags()["images"]}
    tags = [f"preview/{number:02d} {row['task']}" for number, row in enumerate(PROMPTS)]
    kinds = {}
    for tag, picture in pictures.items():
        kinds[" ".join(tag.split()[:2])] = picture.encoded_image_string[:3]
    assert kinds == {tag: b"GIF" if tag.split()[1] in ("t2v", "i2v", "v_edit") else b"\x89PN" for tag in tags[:6]}
    assert (pictures[f"{tags[0]} a red square"].height, pictures[f"{tags[3]} make it green"].height) == (32, 64)
    (preview,) = read(tmp_path / "run", "preview")
    assert (preview["step"], preview["samples"], preview["prompts"]) == (2, len(PROMPTS), len(PROMPTS))
    assert [answer["task"] for answer in preview["answers"]] == ["i2t", "v2t", "t2t"]
    texts = [tag for tag in board.Tags()["tensors"] if "preview" in tag]
    assert [" ".join(tag.split()[:2]).split("/text_summary")[0] for tag in sorted(texts)] == tags[6:]

    sampled = command(
        f"sample --config {held.config} training.precision=float32 --weights run --prompts {held.folder}/prompts.jsonl "
        "--size 32x32 --frames 9 --steps 2 --batch 3 --max-tokens 3 --seed 1234 --out out",
        folder=tmp_path,
    )
    assert sampled.code == 0, sampled.err
    rows = read(tmp_path / "out", "samples")
    assert [row["answer"] for row in rows if "answer" in row] == [answer["answer"] for answer in preview["answers"]]


def test_the_average_is_what_is_exported(command: Commander, train: str, tmp_path: Path) -> None:
    """Validation of averaged weights is validation of a run that starts from their export."""
    for line in (
        f"{train} validation.ema=true training.run_dir=run training.train_iters=2 training.ema_decay=0.9",
        "convert_checkpoint export-lance run out --weights ema",
        f"{train} training.run_dir=again training.train_iters=2 training.init_from=out optimizer.lr=0",
    ):
        done = command(line, folder=tmp_path)
        assert done.code == 0, done.err
    found, again = (read(tmp_path / name, "validation") for name in ("run", "again"))
    assert only(found, OF_VALIDATION) == only(again, OF_VALIDATION)


def test_means_are_of_the_samples_that_could_be_read(command: Commander, tmp_path: Path) -> None:
    """A picture that has become unreadable is said, and lowers no mean."""
    made = make_tiny_run(tmp_path / "tiny")
    held = with_validation(made, tmp_path / "held")
    index = PackIndex.open(held.load().validation.pack_index)
    samples = [sample for number in range(len(index)) for sample in index.pack(number).pack.samples]
    first = next(sample for sample in samples if sample.task is Task.T2I)
    lost = [sample for sample in samples if sample.sample_id == first.sample_id]  # one in each epoch
    path = made.folder / "data" / "text2image.parquet"
    picture = tables()["text2image"]["image_bytes"][int(first.sample_id.split("/")[-1])]
    assert isinstance(picture, bytes)
    path.write_bytes(path.read_bytes().replace(picture, bytes(len(picture))))
    line = f"train --config {held.config} training.precision=float32 training.train_iters=2 optimizer.lr=0"
    done = command(f"{line} training.run_dir=run", folder=tmp_path)
    assert done.code == 0, done.err
    (found,) = read(tmp_path / "run", "validation")
    assert found["broken"] == len(lost) and f"{len(lost)} pictures or clips could not be read" in done.err
    whole = LossCounts.of(index.pack(number).pack for number in range(len(index)))
    rows = dict(zip(map(str, Task), whole.by_task, strict=True))
    lost_rows = sum(sample.velocity_rows for sample in lost)
    rows["t2i"] -= lost_rows
    sums = sum(found["loss_by_task"].get(task, 0.0) * rows[task] for task in ("t2i", "t2v"))
    assert found["velocity_loss"] == pytest.approx(sums / (whole.velocity - lost_rows), rel=1e-6)


def test_a_preview_tells_the_watchdog_of_every_pass(
    command: Commander, train: str, held: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch of large clips may take longer than training.hang_seconds allows; a pass of the model may not."""
    told: list[str] = []
    tell = Watchdog.at

    def at(watchdog: Watchdog, station: str, step: int) -> None:
        told.append(station)
        tell(watchdog, station, step)

    monkeypatch.setattr(Watchdog, "at", at)
    (tmp_path / "list.jsonl").write_text('{"task": "t2i", "caption": "a"}', encoding="utf-8")
    line = f"{train} training.train_iters=1 training.run_dir=run preview.prompts=list.jsonl preview.steps=7"
    done = command(f"{line} validation.pack_index='' preview.scale=1", folder=tmp_path)
    assert done.code == 0, done.err
    assert told.count("preview") == 7 + 1, "the context's and one of each step"
