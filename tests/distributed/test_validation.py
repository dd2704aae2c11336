"""Validation and previews on several ranks: the same figures on every layout, and training does not feel them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_lance.data.pack_index import PackIndex
from tests.command import Commander
from tests.distributed.launch import on_ranks
from tests.shared import REPOSITORY
from tests.tiny import PROMPTS, TinyRun, with_validation

SCRIPT = str(REPOSITORY / "tests" / "distributed" / "run_training.py")
OVERLAP = "parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true"
LAYOUTS = {
    "tp2": "parallel.tensor_model_parallel_size=2",
    "cp2": "parallel.context_parallel_size=2",
    "pp2": "parallel.pipeline_model_parallel_size=2",
    "vpp2": "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=2",
    "dp2": "",
    "dp2-overlap": OVERLAP,
}
STILL = "training.train_iters=1 training.ema_decay=0.5 optimizer.lr=0"
MOVING = "training.train_iters=4 training.ema_decay=0.5 optimizer.lr=0.01"

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def held(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny run with held-out rows and prompts."""
    return with_validation(tiny_run, tmp_path_factory.mktemp("validation") / "run")


def read(run_dir: Path, name: str) -> list[Any]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs(held: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on one rank and on two of every layout, and two of each of several steps, one of which is looked at."""
    folder = tmp_path_factory.mktemp("layouts")
    prompts = f"preview.prompts={held.folder}/prompts.jsonl validation.ema=true preview.ema=true"

    def training(name: str, overrides: str) -> str:
        return f"training.run_dir={folder / name} {overrides}"

    on_ranks(1, SCRIPT, str(held.config), training("one", f"{STILL} {prompts}"))
    trainings = [training(name, f"{STILL} {prompts} {degrees}") for name, degrees in LAYOUTS.items()]
    for name in ("dp2-overlap", "vpp2"):
        for looked, options in {"alone": "validation.pack_index=''", "looked": "", "average": prompts}.items():
            trainings.append(training(f"{name}-{looked}", f"{MOVING} {options} {LAYOUTS[name]}"))
    on_ranks(2, SCRIPT, str(held.config), *trainings)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_figures(layout: str, runs: Path, held: TinyRun) -> None:
    """The number of packs is odd, so on two replicas, or two stages, one stands in."""
    (ours,), (one,) = (read(runs / name, "validation") for name in (layout, "one"))
    packs = len(PackIndex.open(held.load().validation.pack_index))
    assert ours["packs"] == one["packs"] == packs and packs % 2
    assert ours["broken"] == one["broken"] == 0
    for name in ("loss", "ce_loss", "velocity_loss", "loss_by_task"):
        assert ours[name] == pytest.approx(one[name], rel=1e-5), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_samples_every_prompt(layout: str, runs: Path) -> None:
    (ours,), (one,) = (read(runs / name, "preview") for name in (layout, "one"))
    assert ours["samples"] == one["samples"] == len(PROMPTS)
    assert ours["answers"] == one["answers"] and len(ours["answers"]) == 3
    boards = [EventAccumulator(str(runs / name / "tensorboard")).Reload() for name in (layout, "one")]
    tags = [sorted(board.Tags()["images"]) for board in boards]
    assert tags[0] == tags[1] and len(tags[0]) == len(PROMPTS) - 3


@pytest.mark.parametrize("layout", ["dp2-overlap", "vpp2"])
def test_training_is_bit_identical_with_and_without(layout: str, runs: Path) -> None:
    names = ("step", "loss", "ce_loss", "velocity_loss", "loss_by_task", "grad_norm", "learning_rate")
    alone, looked, average = (
        [[line[name] for name in names] for line in read(runs / f"{layout}-{look}", "metrics")]
        for look in ("alone", "looked", "average")
    )
    assert len(alone) == 4 and alone == looked == average
    own, averaged = (read(runs / f"{layout}-{look}", "validation") for look in ("looked", "average"))
    assert [line["step"] for line in own] == [2, 4] == [line["step"] for line in averaged]
    assert own[1]["loss"] != averaged[1]["loss"] and not read(runs / f"{layout}-alone", "validation")


def test_averaged_weights_of_two_replicas_are_exported_and_sampled(
    command: Commander, runs: Path, held: TinyRun, tmp_path: Path
) -> None:
    """One rank that starts from the export measures what two with sharded averages did, and samples what they did."""
    run = runs / "dp2-overlap-average"
    again = "training.train_iters=1 training.init_from=out optimizer.lr=0 training.run_dir=again"
    prompts = f"{held.folder}/prompts.jsonl"
    sample = f"sample --config {held.config} --prompts {prompts} --size 32x32 --frames 9 --steps 2 --batch 3"
    for line in (
        f"convert_checkpoint export-lance {run} out --weights ema",
        f"train --config {held.config} {again} preview.prompts={prompts}",
        f"{sample} --max-tokens 3 --seed 1234 --weights {run} --ema --out averaged",
        f"{sample} --max-tokens 3 --seed 1234 --weights {run} --out own",
    ):
        done = command(line, folder=tmp_path)
        assert done.code == 0, done.err
    ours, (alone,) = read(run, "validation")[-1], read(tmp_path / "again", "validation")
    assert ours["averaged"] and alone["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    answers = [row["answer"] for row in read(tmp_path / "averaged", "samples") if "answer" in row]
    assert answers == [found["answer"] for found in read(run, "preview")[-1]["answers"]]
    tag = f"preview/00 t2i {PROMPTS[0]['caption']}"
    boards = [EventAccumulator(str(folder / "tensorboard")).Reload() for folder in (run, tmp_path / "again")]
    shown = [_pixels(board.Images(tag)[-1].encoded_image_string) for board in boards]
    averaged, own = (_pixels((tmp_path / name / "0000.png").read_bytes()) for name in ("averaged", "own"))
    assert np.abs(shown[0] - averaged).max() <= 1 and np.abs(shown[1] - averaged).max() <= 1
    assert np.abs(own - averaged).max() > 1


def _pixels(data: bytes) -> np.ndarray:
    """Int [H, W, 3] of a PNG."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
