"""Checkpoints from the command line on one rank: resume, refusals, the progress bar, info and export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    export = command(
        "convert_checkpoint export-lance run/checkpoints/step_00000001 out --dtype bfloat16", folder=tmp_path
    )
    assert export.code == 0 and "weights after step 1" in export.out, export.err
    assert "BF16: 125 tensors" in command("convert_checkpoint info out", folder=tmp_path).out
    refused = command("convert_checkpoint export-lance run out", folder=tmp_path)
    assert refused.code == 2 and "'out': exists; give --force" in refused.err
    missing = command("convert_checkpoint export-lance nowhere out2", folder=tmp_path)
    assert missing.code == 2 and "checkpoint 'nowhere': no such folder" in missing.err
    started = command(f"{train} training.run_dir=run2 training.train_iters=1 training.init_from=out", folder=tmp_path)
    assert started.code == 0, started.err


def test_progress_bar_stands_for_log_lines(command: Commander, train: str, tmp_path: Path) -> None:
    shown = command(f"{train} training.train_iters=1 training.progress=true", folder=tmp_path)
    assert shown.code == 0, shown.err
    assert "train: 100%" in shown.err and "1/1" in shown.err and "loss=" in shown.err
    assert "step 1/1" not in shown.err and "saved run/checkpoints/step_00000001" in shown.err


def test_resume_without_a_checkpoint(command: Commander, train: str, tmp_path: Path) -> None:
    for choice, message in {"latest": "has no checkpoint", "7": "step_00000007': no such folder"}.items():
        refused = command(f"{train} training.resume={choice}", folder=tmp_path)
        assert refused.code == 2 and f"training.resume '{choice}'" in refused.err and message in refused.err
    negative = command(f"{train} training.save_interval=-1 training.keep_checkpoints=-2", folder=tmp_path)
    for name, value in (("save_interval", -1), ("keep_checkpoints", -2)):
        assert f"training.{name} = {value}: must not be negative" in negative.err
