"""Frozen weights on several ranks: not a bit changes, the rest trains as on one rank, saves and exports hold all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_lance.checkpoint.hf_export import export_lance
from megatron_lance.checkpoint.hf_lance import RandomSource, bindings, public_shapes
from megatron_lance.checkpoint.manifest import checkpoint_at
from megatron_lance.checkpoint.public_files import WEIGHTS_FILE
from megatron_lance.model.freeze import FREEZE_SETS, is_frozen
from tests.distributed.launch import on_ranks
from tests.shared import REPOSITORY
from tests.tiny import TinyRun

pytestmark = pytest.mark.distributed

TP2, PP2 = (f"parallel.{name}_parallel_size=2" for name in ("tensor_model", "pipeline_model"))
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
RECOMPUTE = ["parallel.recompute_granularity=selective", "parallel.recompute_modules=[core_attn,layernorm,mlp]"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, [TP2, *RECOMPUTE]),
    "pp2": (2, [PP2, *OVERLAP]),
    "dp2": (2, [*OVERLAP, "training.ema_decay=0.5", "parallel.recompute_granularity=full"]),
    "plain": (2, ["parallel.use_distributed_optimizer=false"]),
}
STEPS = "training.train_iters=3"


def jobs(tiny: TinyRun, folder: Path, ranks: int, *settings: str) -> list[dict[str, Any]]:
    """A training of every layout of that many ranks."""
    freeze = f"training.freeze=[{','.join(FREEZE_SETS)}]"
    return [
        {"config": str(tiny.config), "overrides": [freeze, *layout, f"training.run_dir={folder / name}", *settings]}
        | {"weights": ""}
        for name, (needed, layout) in LAYOUTS.items()
        if needed == ranks
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_run: TinyRun) -> Path:
    """Folders whole/NAME: three steps; half/NAME: two steps, then a third of a new process."""
    folder = tmp_path_factory.mktemp("freeze")
    begun, resumed = ("training.train_iters=2",), (STEPS, "training.resume=auto")
    for ranks in (1, 2):
        for name, parts in (
            ("first", [("whole", (STEPS,)), ("half", begun)]),
            ("then", [("half", resumed)]),
        ):
            plan = folder / f"{name}.json"
            plan.write_text(json.dumps([j for kind, s in parts for j in jobs(tiny_run, folder / kind, ranks, *s)]))
            on_ranks(ranks, str(REPOSITORY / "tests" / "distributed" / "run_resume.py"), str(plan))
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_not_a_bit_of_frozen_weights_changes(runs: Path, tiny_run: TinyRun, name: str) -> None:
    run = tiny_run.load()
    begin = RandomSource(run.training.seed, run.model)
    ema = name == "dp2"
    export_lance(checkpoint_at(runs / "whole" / name), runs / f"export_{name}", ema=ema)
    weights = load_file(runs / f"export_{name}" / WEIGHTS_FILE)
    shapes = public_shapes(run.model)
    for parameter, binding in bindings(run.model).items():
        for key in binding.keys:
            same = torch.equal(weights[key], begin.get(key, shapes[key]))
            assert same == is_frozen(parameter, FREEZE_SETS), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_rest_trains_as_on_one_rank(runs: Path, name: str) -> None:
    for ours, one in zip(metrics(runs / "whole" / name), metrics(runs / "whole" / "one"), strict=True):
        for key in ("loss", "ce_loss", "velocity_loss", "grad_norm"):
            assert ours[key] == pytest.approx(one[key], rel=1e-5), f"{key} of step {one['step']}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_goes_on_bit_for_bit(runs: Path, name: str) -> None:
    for whole, half in zip(metrics(runs / "whole" / name), metrics(runs / "half" / name), strict=True):
        for key in ("step", "loss", "ce_loss", "velocity_loss", "grad_norm", "learning_rate"):
            assert whole[key] == half[key], f"{key} of step {whole['step']}"
