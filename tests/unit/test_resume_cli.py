"""Checkpoints from the command line on one rank: resume, refusals, the progress bar, info and export."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lance.checkpoint.manifest import checkpoint_at, open_checkpoint
from megatron_lance.data.prompt import Tokenizer
from tests.command import Commander
from tests.tiny import TinyRun


@pytest.fixture
def train(tiny_run: TinyRun) -> str:
    return f"train --config {tiny_run.config} training.run_dir=run training.precision=float32"


def test_a_run_goes_on_and_is_exported(command: Commander, train: str, tmp_path: Path, tiny_run: TinyRun) -> None:
    first = command(f"{train} training.train_iters=2 training.save_interval=1", folder=tmp_path)
    assert first.code == 0, first.err
    again = command(f"{train} training.train_iters=2", folder=tmp_path)
    assert again.code == 2 and "holds checkpoints of an earlier run" in again.err and "steps 1, 2" in again.err
    more = command(f"{train} training.train_iters=3 training.resume=latest optimizer.lr=1e-4", folder=tmp_path)
    assert more.code == 0, more.err
    assert "going on from run/checkpoints/step_00000002 after step 2" in more.err
    assert "changed since then: optimizer.lr: 0.001 -> 0.0001" in more.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["learning_rate"]) for line in lines] == [(1, 1e-3), (2, 1e-3), (3, 1e-4)]
    done = command(f"{train} training.train_iters=3 training.resume=auto", folder=tmp_path)
    assert done.code == 0 and "nothing to train: training.train_iters 3 are done" in done.err

    info = command("convert_checkpoint info run", folder=tmp_path)
    assert info.code == 0 and "step 3, 6 packs, float32" in info.out
    assert f"tokenizer sha256 {Tokenizer(tiny_run.folder / 'tokenizer').sha256}" in info.out
    export = command("convert_checkpoint export-lance run/checkpoints/step_00000001 out --dtype bf16", folder=tmp_path)
    assert export.code == 0 and "weights after step 1" in export.out, export.err
    assert "bfloat16: 125 tensors" in command("convert_checkpoint info out", folder=tmp_path).out
    refused = command("convert_checkpoint export-lance run out", folder=tmp_path)
    assert refused.code == 2 and "'out': exists; give --force" in refused.err
    missing = command("convert_checkpoint export-lance nowhere out2", folder=tmp_path)
    assert missing.code == 2 and "checkpoint 'nowhere': no such folder" in missing.err
    started = command(f"{train} training.run_dir=run2 training.train_iters=1 training.init_from=out", folder=tmp_path)
    assert started.code == 0, started.err


def last_preview(run_dir: Path) -> bytes:
    """The picture that TensorBoard shows, as PNG."""
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    picture: bytes = board.Images("preview/00 t2i square")[-1].encoded_image_string
    return picture


def test_averaged_weights_are_drawn_sampled_and_exported(
    command: Commander, train: str, tmp_path: Path, tiny_run: TinyRun
) -> None:
    """Drawn and sampled are the pictures of the export, and others than those of the run's own weights."""
    (tmp_path / "prompts.jsonl").write_text('{"task": "t2i", "caption": "square"}\n', encoding="utf-8")
    preview = "preview.prompts=prompts.jsonl preview.height=32 preview.width=32 preview.steps=2"
    for line in (
        f"{train} {preview} preview.ema=true training.train_iters=2 training.ema_decay=0.9 optimizer.lr=0.02",
        "convert_checkpoint export-lance run out --weights ema",
        f"{train} {preview} training.run_dir=run2 training.train_iters=1 training.init_from=out optimizer.lr=0",
    ):
        done = command(line, folder=tmp_path)
        assert done.code == 0, done.err
    assert last_preview(tmp_path / "run") == last_preview(tmp_path / "run2")
    sample = f"sample --config {tiny_run.config} training.precision=float32 --prompt square --size 32x32 --steps 2"
    pictures = {}
    for name, weights in {"own": "run", "average": "run --ema", "exported": "out"}.items():
        done = command(f"{sample} --seed 1234 --weights {weights} --out {name}", folder=tmp_path)
        assert done.code == 0, done.err
        (file,) = (path for path in (tmp_path / name).rglob("*.png") if path.name != "contact_sheet.png")
        pictures[name] = file.read_bytes()
    assert pictures["average"] == pictures["exported"] != pictures["own"]
    assert "float32: 125 tensors" in command("convert_checkpoint info out", folder=tmp_path).out
    refused = command("convert_checkpoint export-lance run2 out2 --weights ema", folder=tmp_path)
    assert refused.code == 2
    assert "has no averaged weights; take its own, or train with training.ema_decay" in refused.err


def test_a_checkpoint_is_written_again_in_another_kind(command: Commander, train: str, tmp_path: Path) -> None:
    """Optimizer state and all, and whatever came after it stays."""
    assert command(f"{train} training.train_iters=2 training.save_interval=1", folder=tmp_path).code == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = f"{train} training.resume=1 training.train_iters=1"
    for kind in ("fully_reshardable", "dp_reshardable", "fully_reshardable"):
        done = command(f"{again} training.save_format={kind}", folder=tmp_path)
        assert done.code == 0 and f"nothing to train: its state is written again as {kind}" in done.err, done.err
        checkpoints = tmp_path / "run" / "checkpoints"
        assert open_checkpoint(checkpoints / "step_00000001").manifest.optimizer == kind
        assert checkpoint_at(tmp_path / "run").manifest.step == 2 and (checkpoints / "step_00000002").is_dir()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    idle = command(again + " training.save_format=fully_reshardable", folder=tmp_path)
    assert idle.code == 0 and "nothing to train: training.train_iters 1 are done; raise it" in idle.err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    more = command(f"{train} training.resume=1 training.train_iters=3", folder=tmp_path)
    straight = command(f"{train} training.run_dir=straight training.train_iters=3", folder=tmp_path)
    assert (more.code, straight.code) == (0, 0)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "straight")]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 3  # the third shows what the second's update made of the state


def test_progress_bar_stands_for_log_lines_on_a_terminal(
    command: Commander, train: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = f"{train} training.train_iters=1 training.progress=true"
    elsewhere = command(f"{wanted} training.run_dir=elsewhere", folder=tmp_path)
    assert "step 1/1" in elsewhere.err and "train: 100%" not in elsewhere.err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = command(wanted, folder=tmp_path)
    assert shown.code == 0, shown.err
    assert "train: 100%" in shown.err and "1/1" in shown.err and "loss=" in shown.err
    assert "step 1/1" not in shown.err and "saved run/checkpoints/step_00000001" in shown.err


def test_resume_without_a_checkpoint(command: Commander, train: str, tmp_path: Path) -> None:
    for choice, message in {"latest": "has no checkpoint", "7": "step_00000007': no such folder"}.items():
        refused = command(f"{train} training.resume={choice}", folder=tmp_path)
        assert refused.code == 2 and f"training.resume '{choice}'" in refused.err and message in refused.err
    negative = command(f"{train} training.save_interval=-1 training.keep_last=-2", folder=tmp_path)
    for name, value in (("save_interval", -1), ("keep_last", -2)):
        assert f"training.{name} = {value}: must not be negative" in negative.err
