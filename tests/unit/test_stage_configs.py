"""The configurations of the training stages hold the recipes' numbers, and tiny twins keep what makes a stage.

The numbers here are typed from the recipes (spec/recipes.md), not from the files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import pytest
import yaml

from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.config.validate import validate
from tests.shared import REPOSITORY

CONFIGS = REPOSITORY / "examples" / "configs"


@dataclass(frozen=True)
class Recipe:
    """A column of the recipes' tables; packs per step and steps follow from tokens seen, and PT and CT share theirs."""

    lr: float
    schedule: str
    warm_up: int
    steps: int
    ce_weight: float
    tokens_per_rank: int
    max_context: int
    tokens_seen: float
    generation_size: tuple[int, int]
    understanding_size: tuple[int, int]
    shift: float
    text_dropped: float
    all_dropped: float
    image: tuple[int, int, int]  # T2I, I-Edit, S2I
    video: tuple[int, int, int, int]  # T2V, I2V, V-Edit, S2V


def _pt() -> Recipe:
    sizes = ((192, 848), (168, 826))
    return Recipe(
        1e-4,
        "constant",
        2500,
        350_000,
        0.25,
        50_000,
        40_000,
        1.5e12,
        *sizes,
        1.0,
        0.1,
        0.0,
        (100, 0, 0),
        (100, 0, 0, 0),
    )


def _later(lr: float, schedule: str, warm_up: int, steps: int, ce: float, tokens: float, *mixture: Any) -> Recipe:
    sizes = ((480, 848), (462, 826))
    return Recipe(lr, schedule, warm_up, steps, ce, 80_000, 70_000, tokens, *sizes, 4.0, 0.05, 0.05, *mixture)


_CT = (1e-4, "constant", 2500, 80_000, 0.5, 3e11)
RECIPES = {
    "pt": _pt(),
    "ct1": _later(*_CT, (70, 15, 15), (60, 10, 15, 15)),
    "ct2": _later(*_CT, (60, 20, 20), (40, 20, 20, 20)),
    "ct3": _later(*_CT, (50, 25, 25), (25, 25, 25, 25)),
    "sft": _later(2.5e-5, "cosine", 500, 15_000, 0.25, 7.2e10, (60, 20, 20), (60, 10, 15, 15)),
}
RESOLUTIONS = {"192p": (256, 224), "360p": (480, 476), "480p": (640, 616)}
# file -> recipe, resolution, file of the stage before
FILES = {
    "pt_192p": ("pt", "192p", ""),
    "pt_360p": ("pt", "360p", "pt_192p"),
    "pt_480p": ("pt", "480p", "pt_360p"),
    "ct1": ("ct1", "480p", "pt_480p"),
    "ct2": ("ct2", "480p", "ct1"),
    "ct3": ("ct3", "480p", "ct2"),
    "sft": ("sft", "480p", "ct3"),
}
TWINS = {"pt": "pt_192p", "ct1": "ct1", "ct2": "ct2", "ct3": "ct3", "sft": "sft"}


def load(name: str) -> RunConfig:
    return load_config([str(CONFIGS / f"{name}.yaml")], [])


def shares(run: RunConfig) -> dict[str, float]:
    total = sum(source.weight for source in run.data.sources)
    return {source.task: 100 * source.weight / total for source in run.data.sources}


def test_every_stage_file_is_looked_at() -> None:
    names = {path.stem.removeprefix("lance_3b_") for path in CONFIGS.glob("lance_3b_*.yaml")}
    assert names == set(FILES)
    assert {path.stem for path in CONFIGS.glob("tiny_*.yaml")} == {"tiny_stage", *(f"tiny_{name}" for name in TWINS)}


@pytest.mark.parametrize("name", FILES)
def test_a_stage_has_the_numbers_of_its_recipe(name: str) -> None:
    run, recipe = load(f"lance_3b_{name}"), RECIPES[FILES[name][0]]
    optimizer, objective, data, training = run.optimizer, run.objective, run.data, run.training
    assert (optimizer.lr, optimizer.lr_decay_style, optimizer.lr_warmup_iters) == (
        recipe.lr,
        recipe.schedule,
        recipe.warm_up,
    )
    assert (optimizer.weight_decay, optimizer.clip_grad, optimizer.min_lr) == (0.0, 1.0, 0.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-15)
    assert (objective.ce_weight, objective.mse_weight, objective.timestep_shift) == (
        recipe.ce_weight,
        1.0,
        recipe.shift,
    )
    assert (data.seq_length, data.max_sample_length) == (recipe.tokens_per_rank, recipe.max_context)
    assert (data.vae_resolution, data.vit_resolution) == RESOLUTIONS[FILES[name][1]]
    assert data.vae_sides == recipe.generation_size
    assert data.vit_sides == recipe.understanding_size
    assert (data.dropout_scheme, data.caption_dropout, data.condition_dropout) == (
        "paper",
        recipe.text_dropped,
        recipe.all_dropped,
    )
    assert (run.model.mape_step, data.target_fps) == (1000, 12.0)
    assert (data.max_seconds_generation, data.max_seconds_understanding) == (6.0, 2.0)
    packs = recipe.tokens_seen / recipe.steps / recipe.tokens_per_rank
    assert training.global_batch_size == pytest.approx(packs, rel=0.15)
    assert training.precision == "bf16" and training.freeze == ()
    assert (run.preview.scale, run.preview.height, run.preview.width) == (4.0, 768, 768)


@pytest.mark.parametrize("name", FILES)
def test_a_stage_has_the_mixture_of_its_recipe(name: str) -> None:
    run, recipe = load(f"lance_3b_{name}"), RECIPES[FILES[name][0]]
    want = {"v2t": 16.0, "i2t": 4.0}
    want |= dict(zip(("t2v", "i2v", "v_edit", "s2v"), (0.64 * part for part in recipe.video), strict=True))
    want |= dict(zip(("t2i", "i_edit", "s2i"), (0.16 * part for part in recipe.image), strict=True))
    assert shares(run) == pytest.approx({task: share for task, share in want.items() if share})


def test_stages_of_one_recipe_share_its_steps() -> None:
    steps: dict[int, int] = {}
    for name, (recipe, *_) in FILES.items():
        whole = RECIPES[recipe].steps
        steps[whole] = steps.get(whole, 0) + load(f"lance_3b_{name}").training.train_iters
    assert steps == {whole: whole for whole in (350_000, 80_000, 15_000)}


@pytest.mark.parametrize("name", FILES)
def test_a_stage_starts_from_the_one_before(name: str) -> None:
    before = FILES[name][2]
    want = load(f"lance_3b_{before}").training.run_dir if before else "checkpoints/qwen25_vl_3b"
    assert load(f"lance_3b_{name}").training.init_from == want


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("ranks", [8, 16])
def test_a_stage_is_valid(name: str, ranks: int) -> None:
    validate(load(f"lance_3b_{name}"), ranks)


def layout_file(stage: str, devices: int, memory: str) -> str:
    if (stage, devices, memory) == ("sft", 128, "80GB"):
        return "sft_80gb_128"
    kind = f"{'pt' if stage == 'pt' else 'later'}_{memory.lower()}"
    return f"{kind}_8" if devices == 8 and memory == "80GB" else kind


PLANS = json.loads((REPOSITORY / "docs" / "results" / "planner" / "lance_3b.json").read_text(encoding="utf-8"))["plans"]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p['stage']}-{p['devices']}x{p['memory']}")
def test_layouts_are_the_planners(plan: dict[str, Any]) -> None:
    """The stage's own global batch fits every layout, so the same packs form a step on every cluster."""
    layout = CONFIGS / "layouts" / f"{layout_file(plan['stage'], plan['devices'], plan['memory'])}.yaml"
    stages = [name for name, (recipe, *_) in FILES.items() if recipe.startswith(plan["stage"])]
    assert stages
    for stage in stages:
        file = str(CONFIGS / f"lance_3b_{stage}.yaml")
        run = load_config([file, str(layout)], [])
        validate(run, plan["devices"])
        chosen = load_config([file], [o for o in plan["choice"]["overrides"] if o.startswith("parallel.")])
        for field in fields(run.parallel):
            if field.name != "recompute_modules" or run.parallel.recompute_granularity == "selective":
                assert getattr(run.parallel, field.name) == getattr(chosen.parallel, field.name), field.name


def test_every_layout_is_of_a_plan() -> None:
    files = {path.stem for path in (CONFIGS / "layouts").glob("*.yaml")}
    assert files == {layout_file(plan["stage"], plan["devices"], plan["memory"]) for plan in PLANS}


@pytest.mark.parametrize("name", FILES)
def test_every_value_has_its_source_beside_it(name: str) -> None:
    lines = (CONFIGS / f"lance_3b_{name}.yaml").read_text(encoding="utf-8").splitlines()
    values = [line for line in lines if ":" in line and not line.lstrip().startswith("#") and not line.endswith(":")]
    bare = [line.strip() for line in values if "  # " not in line]
    assert [line.partition(":")[0] for line in bare] == ["extends", "run_dir"]


@pytest.mark.parametrize("twin", TWINS)
def test_a_tiny_twin_keeps_what_makes_its_stage(twin: str) -> None:
    small, big = load(f"tiny_{twin}"), load(f"lance_3b_{TWINS[twin]}")
    validate(small, 2)
    for section, names in {
        "objective": ("ce_weight", "mse_weight", "timestep_shift", "timestep_distribution"),
        "optimizer": ("lr_decay_style", "min_lr", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps"),
        "data": ("dropout_scheme", "caption_dropout", "condition_dropout"),
    }.items():
        for name in names:
            assert getattr(getattr(small, section), name) == getattr(getattr(big, section), name), name
    own = {source.task: source.weight for source in small.data.sources}
    assert own == {source.task: source.weight for source in big.data.sources if source.task != "s2v"}
    order = list(TWINS)
    before = order[order.index(twin) - 1] if twin != "pt" else ""
    assert small.training.init_from == (load(f"tiny_{before}").training.run_dir if before else "")


def test_learning_rates_of_twins_have_the_ratios_of_the_recipe() -> None:
    rates = {twin: load(f"tiny_{twin}").optimizer.lr for twin in TWINS}
    assert {twin: rate / rates["pt"] for twin, rate in rates.items()} == pytest.approx(
        {twin: recipe.lr / RECIPES["pt"].lr for twin, recipe in RECIPES.items()}
    )


def test_paths_are_not_of_one_machine() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        text = yaml.safe_dump(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert " /" not in text and "~" not in text, path
