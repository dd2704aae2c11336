"""The demo's command lines: settings that a run can follow, however short it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lance.config.loader import load_config
from megatron_lance.config.validate import validate
from tests.command import Commander
from tests.shared import REPOSITORY
from tools import run_demo


@pytest.mark.parametrize(("iters", "warmup"), [(1, 0), (40, 20), (50, 25), (51, 50), (760, 50)])
def test_runs_shorter_than_the_warm_up_shorten_it(
    iters: int, warmup: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run_demo, "ranks", lambda: 2)
    monkeypatch.chdir(tmp_path)  # the stages run in the repository
    commands = dict(run_demo.stages(Path("runs/try"), iters, 5, run_demo.CONFIG, 0.25))
    for stage in ("train", "resume"):
        settings = [word for word in commands[stage] if "=" in word and not word.startswith("-")]
        config = load_config([str(REPOSITORY / run_demo.CONFIG)], settings)
        assert config.optimizer.lr_warmup_iters == warmup
        validate(config, 2)


@pytest.mark.parametrize("wrong", ["--iters 0", "--extra 0"])
def test_a_demo_without_steps_is_refused_before_any_stage(command: Commander, tmp_path: Path, wrong: str) -> None:
    done = command(f"run_demo --out {tmp_path / 'demo'} {wrong}")
    assert done.code == 2 and "must be positive; correct them" in done.err
    assert not done.out and not (tmp_path / "demo").exists()
