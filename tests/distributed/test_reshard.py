"""A state saved on tp 2 x pp 2, loaded on other layouts; averaged weights on all of them.

What the table in the README says of the kinds of an optimizer's state is done here: every "yes" by a load.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lance.checkpoint.hf_lance import POSITION_KEY, RandomSource
from megatron_lance.checkpoint.manifest import DP_RESHARDABLE, FULLY_RESHARDABLE, open_checkpoint
from megatron_lance.checkpoint.view import CheckpointView
from tests.distributed.launch import on_ranks
from tests.distributed.stored import assert_equal_tensors, stored_tensors
from tests.shared import REPOSITORY
from tests.tiny import TinyRun

pytestmark = pytest.mark.distributed

TP2, PP2, CP2 = (f"parallel.{name}_parallel_size=2" for name in ("tensor_model", "pipeline_model", "context"))
TP4 = "parallel.tensor_model_parallel_size=4"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
PLAIN = ["parallel.use_distributed_optimizer=false", "training.ema_decay=0"]
FULLY = f"training.save_format={FULLY_RESHARDABLE}"
DECAY = 0.75
# Layouts that go on from tp 2 x pp 2, with their ranks.
OTHERS: dict[str, tuple[int, list[str]]] = {
    "tp4": (4, [TP4]),
    "cp2": (2, [CP2]),
    "dp2": (2, []),
    "pp2_vpp2": (2, [PP2, VPP2]),
    "pp2_uneven": (2, [PP2, "parallel.num_layers_in_first_pipeline_stage=1"]),
    "one": (1, []),
}


@dataclass(frozen=True)
class Runs:
    """Runs below one folder: `source` (4 steps, a checkpoint of each), then `next` (step 4) and `again` (no step)."""

    folder: Path
    tiny: TinyRun

    def job(self, name: str, layout: list[str], steps: int, *settings: str) -> dict[str, Any]:
        own = [f"training.run_dir={self.folder / name}", f"training.train_iters={steps}", "training.save_interval=1"]
        common = ["optimizer.weight_decay=0.1", f"training.ema_decay={DECAY}"]
        return {"config": str(self.tiny.config), "overrides": [*common, *own, *layout, *settings], "weights": ""}

    def later(self, ranks: int) -> list[dict[str, Any]]:
        resume = f"training.resume={self.step('source', 3)}"
        jobs = []
        for name, layout in ((n, at) for n, (r, at) in OTHERS.items() if r == ranks):
            jobs.append(self.job(f"next_{name}", layout, 4, resume))
            jobs.append(self.job(f"again_{name}", layout, 3, resume, FULLY))
        return jobs

    def do(self, ranks: int, jobs: list[dict[str, Any]]) -> None:
        plan = self.folder / "jobs.json"
        plan.write_text(json.dumps(jobs), encoding="utf-8")
        on_ranks(ranks, str(REPOSITORY / "tests" / "distributed" / "run_resume.py"), str(plan))

    def step(self, name: str, step: int) -> Path:
        return self.folder / name / "checkpoints" / f"step_{step:08d}"

    def losses(self, name: str) -> dict[int, float]:
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {line["step"]: line["loss"] for line in map(json.loads, lines)}

    def weights(self, checkpoint: Path, ema: bool) -> dict[str, torch.Tensor]:
        view = CheckpointView(open_checkpoint(checkpoint), ema=ema)
        return {key: view.get(key) for key in view.specs if key != POSITION_KEY}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_run: TinyRun) -> Runs:
    found = Runs(tmp_path_factory.mktemp("reshard"), tiny_run)
    source = found.job("source", [TP2, PP2], 4, "training.fully_reshardable_every=3", "training.async_save=true")
    found.do(4, [source, *found.later(4)])
    plain = found.job("plain", [PP2, VPP2, *PLAIN], 5)
    other = found.job("next_plain", [TP2, *PLAIN], 5, f"training.resume={found.step('plain', 3)}")
    found.do(2, [*found.later(2), plain, other])
    found.do(1, found.later(1))
    return found


def test_every_third_save_is_fully_reshardable(runs: Runs) -> None:
    kinds = [open_checkpoint(runs.step("source", step)).manifest.optimizer for step in (1, 2, 3, 4)]
    assert kinds == [DP_RESHARDABLE, DP_RESHARDABLE, FULLY_RESHARDABLE, DP_RESHARDABLE]


@pytest.mark.parametrize("name", OTHERS)
def test_the_next_loss_is_that_of_the_layout_before(runs: Runs, name: str) -> None:
    assert runs.losses(f"next_{name}") == {4: pytest.approx(runs.losses("source")[4], rel=1e-6)}


def test_the_plain_optimizer_loads_on_another_layout(runs: Runs) -> None:
    """The fifth loss shows what the fourth update made of the moments."""
    before = runs.losses("plain")
    assert runs.losses("next_plain") == {step: pytest.approx(before[step], rel=1e-5) for step in (4, 5)}


@pytest.mark.parametrize("name", OTHERS)
def test_the_state_is_equal_element_for_element(runs: Runs, name: str) -> None:
    """Written again as it was loaded: weights, float32 main weights, both moments and averaged weights."""
    before, after = (stored_tensors(runs.step(run, 3)) for run in ("source", f"again_{name}"))
    assert_equal_tensors(after, before)
    kinds = {key.split(".")[2] for key in before if key.startswith("optimizer.state.")}
    assert kinds == {"param", "exp_avg", "exp_avg_sq"}
    common = [torch.load(runs.step(run, 3) / "common.pt", weights_only=False) for run in ("source", f"again_{name}")]
    groups = [state["optimizer"]["optimizer"]["param_groups"] for state in common]
    assert [group["step"] for group in groups[0]] == [group["step"] for group in groups[1]] == [3.0] * len(groups[0])


def test_averages_are_those_of_one_process(runs: Runs) -> None:
    model = runs.tiny.load().model
    source = RandomSource(runs.tiny.load().training.seed, model)
    average: dict[str, torch.Tensor] = {}
    for step in (1, 2, 3, 4):
        weights = runs.weights(runs.step("source", step), ema=False)
        average = average or {key: source.get(key, tuple(tensor.shape)) for key, tensor in weights.items()}
        before = average
        average = {key: average[key] * DECAY + weights[key] * (1.0 - DECAY) for key in weights}
        assert_equal_tensors(runs.weights(runs.step("source", step), ema=True), average)
        if step == 4:
            for name in OTHERS:
                own = runs.weights(runs.step(f"next_{name}", 4), ema=False)
                expected = {key: before[key] * DECAY + own[key] * (1.0 - DECAY) for key in own}
                assert_equal_tensors(runs.weights(runs.step(f"next_{name}", 4), ema=True), expected)


def test_without_a_decay_nothing_is_averaged(runs: Runs) -> None:
    assert not stored_tensors(runs.step("plain", 4), "ema.")


def test_averages_are_exchanged_for_weights_and_back(tiny_run: TinyRun) -> None:
    script = str(REPOSITORY / "tests" / "distributed" / "run_ema.py")
    on_ranks(2, script, str(tiny_run.config), f"training.ema_decay={DECAY}")
