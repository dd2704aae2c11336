"""What FP8 asks of a run: rows and columns per recipe, and rules between fields.

Station: configuration -> [alignment] -> layout; configuration -> [rules] -> validation.  Figures are those of
TransformerEngine 2.11 and megatron-core 0.16.1, whose checks are named beside them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_lance.config.schema import RunConfig

RECIPES = ("none", "delayed", "tensorwise", "blockwise", "mxfp8")

GEMM_ALIGNMENT = 16
"""Rows and columns of an FP8 matrix product: `assert_dim_for_fp8_exec` (transformer_engine/pytorch/utils.py) wants rows
in multiples of 8 and columns in multiples of 16, and the gradient of a weight, whose columns are rows, so both;
`get_fp8_align_size` (megatron/core/fp8_utils.py) says 16 for all recipes but MXFP8."""
MXFP8_BLOCK = 32
"""Values that share a scaling factor: `MXFP8Quantizer.make_empty` wants both sides in multiples of it, as does
`get_fp8_align_size`."""
SCALING_BLOCK = 128
"""Side of blockwise scaling's blocks.  A tensor may end within one, but not what is gathered over tensor-parallel
ranks: `assert_dim_for_all_gather` asks `Float8BlockQuantizer.is_quantizable`, which wants both sides of a shard in
multiples of it."""


def fp8_alignment(recipe: str, tp: int) -> int:
    """Rows that an expert region's share on one tensor-parallel rank must be a multiple of.

    Args:
        recipe: one of RECIPES.
        tp: tensor-parallel ranks; with more than one, shards are quantised before they are gathered.
    """
    if recipe == "none":
        return 1
    if recipe == "mxfp8":
        return MXFP8_BLOCK
    return SCALING_BLOCK if recipe == "blockwise" and tp > 1 else GEMM_ALIGNMENT


def row_alignment(run: RunConfig) -> int:
    """Rows that every region's share on one tensor-parallel rank is a multiple of: what both settings ask for."""
    fp8 = fp8_alignment(run.fp8.recipe, run.parallel.tensor_model_parallel_size)
    return math.lcm(run.parallel.region_alignment, fp8)


def fp8_problems(run: RunConfig) -> Iterator[str]:
    """A line per broken rule: field, value, rule, remedy."""
    fp8, parallel = run.fp8, run.parallel
    if fp8.recipe == "none":
        return
    name = f"fp8.recipe = {fp8.recipe}"
    if run.model.transformer_impl != "transformer_engine":
        yield (
            f"{name}: is a recipe of TransformerEngine, but model.transformer_impl = {run.model.transformer_impl}; set "
            "model.transformer_impl=transformer_engine, or fp8.recipe=none"
        )
    if run.training.precision != "bf16":
        yield f"{name}: needs training.precision=bf16, which is {run.training.precision}; set that, or fp8.recipe=none"
    most = run.model.num_layers // parallel.pipeline_model_parallel_size
    for field in ("first_layers_bf16", "last_layers_bf16"):
        layers = getattr(fp8, field)
        if layers > most:
            yield f"fp8.{field} = {layers}: must not exceed the {most} layers of a pipeline stage; lower it"
        if layers and fp8.recipe == "delayed":
            yield (
                f"fp8.{field} = {layers}: delayed scaling enters FP8 once for all layers; set 0, or another fp8.recipe"
            )
    modules = parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()
    if fp8.recipe == "delayed" and "layernorm" in modules:
        yield (
            f"parallel.recompute_modules = {list(modules)}: delayed scaling does not keep what layernorm would be "
            "recomputed for; leave layernorm out, or set another fp8.recipe"
        )
    yield from _columns(run)


def _columns(run: RunConfig) -> Iterator[str]:
    """Widths of the linears, which are columns of one product and rows of another."""
    model, tp = run.model, run.parallel.tensor_model_parallel_size
    inner = MXFP8_BLOCK if run.fp8.recipe == "mxfp8" else GEMM_ALIGNMENT
    heads = model.num_attention_heads + 2 * model.num_query_groups
    widths = (
        ("model.hidden_size", model.hidden_size, fp8_alignment(run.fp8.recipe, tp)),
        ("model.ffn_hidden_size / tp", model.ffn_hidden_size // tp, inner),
        ("query heads x model.kv_channels / tp", model.num_attention_heads * model.kv_channels // tp, inner),
        ("all heads x model.kv_channels / tp", heads * model.kv_channels // tp, inner),
    )
    for field, width, multiple in widths:
        if width % multiple:
            yield (
                f"{field} = {width}: fp8.recipe {run.fp8.recipe} on tp {tp} wants a multiple of {multiple}; change the "
                "model, the degree or the recipe"
            )
