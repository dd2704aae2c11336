"""FP8: rows per recipe, and the rules of its settings, on the sizes of Lance-3B."""

from __future__ import annotations

import argparse
import math

import pytest

from megatron_lance.config.fp8 import RECIPES, fp8_alignment, fp8_problems, row_alignment
from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.config.validate import validate
from megatron_lance.data.synthetic import STAGES, stage_packs
from megatron_lance.packing.layout import Layout
from megatron_lance.profiling.benchmarks import fp8_padding
from megatron_lance.profiling.benchmarks.fp8_padding import LAYOUTS, Regions, measure
from tests.shared import REPOSITORY
from tests.unit.tiny_model import mixed_pack

ENGINE = ["model.transformer_impl=transformer_engine", "parallel.recompute_granularity=null"]
TP = "parallel.tensor_model_parallel_size"


def lance(*overrides: str) -> RunConfig:
    return load_config([str(REPOSITORY / "examples" / "configs" / "lance_3b.yaml")], [*ENGINE, *overrides])


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "none"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_recipe_trains_lance_3b(recipe: str, tp: int) -> None:
    validate(lance(f"fp8.recipe={recipe}", f"{TP}={tp}"), tp)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_shards_are_what_transformer_engine_checks(recipe: str, tp: int) -> None:
    """Rows of a shard and of a whole region, as its linears see them, for a pack of few tokens."""
    run = lance(f"fp8.recipe={recipe}", f"{TP}={tp}", "parallel.region_alignment=12")
    layout = Layout.build(mixed_pack(), 1, tp, row_alignment(run))
    for rows, whole in zip(layout.shard_rows, (layout.und_rows, layout.gen_rows), strict=True):
        assert rows % 12 == 0 and rows * tp == whole
        if recipe != "none":
            assert rows % 8 == 0 and whole % 16 == 0  # operands, and the weight's gradient
        if recipe == "mxfp8":
            assert rows % 32 == 0
        if recipe == "blockwise" and tp > 1:
            assert rows % 128 == 0  # quantised before it is gathered
    assert row_alignment(run) == math.lcm(12, fp8_alignment(recipe, tp))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["model.transformer_impl=local"], "fp8.recipe = tensorwise: is a recipe of TransformerEngine"),
        (["training.precision=float32"], "fp8.recipe = tensorwise: needs training.precision=bf16, which is float32"),
        (["fp8.first_layers_bf16=37"], "fp8.first_layers_bf16 = 37: must not exceed the 36 layers"),
        (["fp8.recipe=delayed", "fp8.last_layers_bf16=1"], "fp8.last_layers_bf16 = 1: delayed scaling enters FP8 once"),
        (["model.ffn_hidden_size=11000"], "model.ffn_hidden_size / tp = 11000: fp8.recipe tensorwise on tp 1 wants a"),
        (
            ["fp8.recipe=mxfp8", "model.ffn_hidden_size=11024"],
            "model.ffn_hidden_size / tp = 11024: fp8.recipe mxfp8 on tp 1 wants a multiple of 32",
        ),
        (
            ["fp8.recipe=blockwise", f"{TP}=2", "model.hidden_size=2080"],
            "model.hidden_size = 2080: fp8.recipe blockwise on tp 2 wants a multiple of 128",
        ),
        (
            [
                "fp8.recipe=delayed",
                "parallel.recompute_granularity=selective",
                "parallel.recompute_modules=[layernorm]",
            ],
            "parallel.recompute_modules = ['layernorm']: delayed scaling does not keep",
        ),
    ],
)
def test_rules_between_fields(overrides: list[str], problem: str) -> None:
    (found,) = fp8_problems(lance("fp8.recipe=tensorwise", *overrides))
    assert found.startswith(problem)


def test_without_a_recipe_there_are_no_rules() -> None:
    run = load_config([str(REPOSITORY / "examples" / "configs" / "tiny.yaml")], ["fp8.first_layers_bf16=99"])
    assert list(fp8_problems(run)) == [] and row_alignment(run) == run.parallel.region_alignment


# ---- the benchmark of padding


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 4), (8, 16)])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_figures_are_those_of_real_layouts(recipe: str, tp: int, cp: int) -> None:
    packs = stage_packs("ct3", 3)
    regions = Regions.of(packs, STAGES["ct3"].capacity)
    found = measure(regions, recipe, tp, cp)
    layouts = [Layout.build(pack, cp, tp, found["alignment"]) for pack in packs]
    assert {layout.rows for layout in layouts} == {found["rows_per_cp_rank"]}
    assert found["padding"] == pytest.approx(layouts[0].tokens.size / packs[0].capacity - 1)
    assert found["packs_with_small_und"] == sum(layout.small[0] for layout in layouts) / 3
    assert found["packs_with_small_gen"] == sum(layout.small[1] for layout in layouts) / 3
    assert regions.fill == pytest.approx(sum(p.length for p in packs) / sum(p.capacity for p in packs))


def test_what_computes_in_bf16_is_counted_in_tokens() -> None:
    regions = Regions(100, [(90, 10), (20, 80)])
    found = measure(regions, "mxfp8", 1, 1)
    assert (found["packs_with_small_und"], found["packs_with_small_gen"]) == (0.5, 0.5)
    assert found["tokens_in_bf16"] == (10 + 20) / 200 and regions.fill == 1.0
    assert measure(regions, "delayed", 1, 1)["tokens_in_bf16"] == 0.0


def test_the_table_has_every_recipe_and_layout() -> None:
    parser = argparse.ArgumentParser()
    fp8_padding.add_arguments(parser)
    result = fp8_padding.run(parser.parse_args("--stage pt --packs 4".split()))
    assert len(result["stages"]["pt"]["rows"]) == len(RECIPES) * len(LAYOUTS)
    lines = fp8_padding.table(result).splitlines()
    assert len(lines) == 2 + len(LAYOUTS) and all(recipe in lines[1] for recipe in RECIPES)
