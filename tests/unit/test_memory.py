"""The memory estimate: parameters exactly those of built models, bytes by their rules."""

from __future__ import annotations

import pytest

from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.config.validate import validate
from megatron_lance.model.lance_model import build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.packing.sample import Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.profiling.memory import PackLoad, layer_activation_bytes, layers_of_stages, memory_per_rank
from tests.shared import REPOSITORY
from tests.unit.tiny_model import batch_of, one_rank, pack_of, values_of

CONFIGS = REPOSITORY / "examples" / "configs"
LANCE_3B = 6_176_817_200
"""Trainable parameters of both experts, embeddings, heads and connectors (spec/model.md section 1)."""


def configuration(name: str, *overrides: str) -> RunConfig:
    return load_config([str(CONFIGS / name)], overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.num_layers=2", "model.num_query_groups=1"],
        ["model.num_query_groups=4", "model.ffn_hidden_size=72", "model.vocab_size=640"],
        ["model.hidden_size=48", "model.kv_channels=32", "model.mrope_section=[4,6,6]", "model.latent_channels=16"],
        ["training.precision=bf16", "parallel.recompute_granularity=full"],
    ],
)
def test_parameters_are_those_of_the_built_model(overrides: list[str]) -> None:
    run = configuration("tiny.yaml", *overrides)
    validate(run, 1)
    with one_rank():
        config = transformer_config(run.model, run.parallel, run.training.precision)
        stages = build_stages(config, run.model, tokenizer_size=300)
        count = sum(p.numel() for stage in stages for p in stage.parameters())
        size = sum(p.numel() * p.element_size() for stage in stages for p in stage.parameters())
    (memory,) = memory_per_rank(run, 1)
    assert (memory.parameters, memory.weight_bytes) == (count, size)


def test_parameters_of_lance_3b() -> None:
    (memory,) = memory_per_rank(configuration("lance_3b.yaml"), 1)
    assert memory.parameters == LANCE_3B
    assert (memory.weight_bytes, memory.gradient_bytes, memory.optimizer_bytes) == tuple(
        width * LANCE_3B for width in (2, 4, 12)
    )


def test_pipeline_stages_share_out_all_parameters() -> None:
    split = configuration(
        "lance_3b.yaml",
        "parallel.pipeline_model_parallel_size=4",
        "parallel.num_layers_in_first_pipeline_stage=6",
        "parallel.num_layers_in_last_pipeline_stage=8",
    )
    assert layers_of_stages(split) == [6, 11, 11, 8]
    assert sum(memory.parameters for memory in memory_per_rank(split, 4)) == LANCE_3B


def test_distributed_optimizer_shards_over_replicas_and_context_ranks() -> None:
    degrees = ["parallel.context_parallel_size=2"]
    (sharded,) = memory_per_rank(configuration("lance_3b.yaml", *degrees), 8)
    assert sharded.optimizer_bytes == 12 * LANCE_3B // 8
    averaged = configuration("lance_3b.yaml", *degrees, "training.ema_decay=0.999")
    assert memory_per_rank(averaged, 8)[0].optimizer_bytes == 16 * LANCE_3B // 8
    whole = configuration("lance_3b.yaml", *degrees, "parallel.use_distributed_optimizer=false")
    assert memory_per_rank(whole, 8)[0].optimizer_bytes == 12 * LANCE_3B


def test_activations_shrink_with_recompute_and_degrees() -> None:
    def activations(*overrides: str, ranks: int = 1) -> int:
        return memory_per_rank(configuration("lance_3b.yaml", *overrides), ranks)[0].activation_bytes

    kept = activations("parallel.recompute_granularity=null")
    assert activations() < kept / 5
    selective = "parallel.recompute_granularity=selective"
    for module in ("core_attn", "layernorm", "mlp"):
        assert activations() < activations(selective, f"parallel.recompute_modules=[{module}]") < kept
    assert activations("parallel.recompute_granularity=null", "parallel.tensor_model_parallel_size=2", ranks=2) < kept
    assert activations("parallel.recompute_granularity=null", "parallel.context_parallel_size=2", ranks=2) < kept
    assert activations("data.seq_length=25000") < activations()


def test_offloaded_layers_are_on_the_host_but_for_two() -> None:
    """Of 36 layers 30 wait on the host; recomputed attention keeps its gathered keys and values."""
    for again in ("parallel.recompute_granularity=null", "parallel.recompute_granularity=selective"):
        run, away, most = (
            configuration("lance_3b.yaml", again, f"parallel.offload_layers={layers}") for layers in (0, 30, 36)
        )
        layer, held = layer_activation_bytes(run), 2 * 2 * 2 * 128 * 50_000 if again.endswith("selective") else 0
        (kept,), (some,), (all_,) = (memory_per_rank(each, 1) for each in (run, away, most))
        assert (kept.host_bytes, some.host_bytes, all_.host_bytes) == tuple(n * (layer - held) for n in (0, 30, 36))
        assert kept.activation_bytes - some.activation_bytes == 30 * (layer - held)
        assert kept.activation_bytes - all_.activation_bytes == 34 * layer - 36 * held
        assert kept.total_bytes - some.total_bytes == kept.activation_bytes - some.activation_bytes
        assert "on the host" in some.line() and "on the host" not in kept.line()


def test_passes_that_wait_keep_what_is_not_offloaded() -> None:
    """The first of four stages with four passes: one under way, three that wait."""
    four = ["parallel.pipeline_model_parallel_size=4", "training.global_batch_size=8"]
    plain = ["parallel.recompute_granularity=null", *four]
    run = configuration("lance_3b.yaml", *plain, "parallel.offload_layers=5")
    kept, some = (memory_per_rank(each, 4)[0] for each in (configuration("lance_3b.yaml", *plain), run))
    assert kept.activation_bytes - some.activation_bytes == 4 * 5 * layer_activation_bytes(run) == some.host_bytes


def test_one_expert_may_recompute() -> None:
    """The more rows it has, the less is kept."""
    load = PackLoad(ce_rows=100, copied_keys=100_000, und_rows=0.25, gen_rows=0.75)

    def kept(*overrides: str) -> int:
        run = configuration("lance_3b.yaml", "parallel.recompute_modules=[layernorm,mlp]", *overrides)
        return layer_activation_bytes(run, load)

    selective = "parallel.recompute_granularity=selective"
    none, both = kept("parallel.recompute_granularity=null"), kept(selective)
    und, gen = (kept(selective, f"parallel.recompute_experts=[{expert}]") for expert in ("und", "gen"))
    assert (none - und) / (none - both) == pytest.approx(0.25) and (none - gen) / (none - both) == pytest.approx(0.75)


def test_what_layers_keep_by_implementation() -> None:
    """Lance-3B: of an MLP's values 5 w, 2 w + w or 2 w + 1 bytes; in FP8 weights beside it in two copies."""
    rows, ffn = 50_008, 11_008

    def kept(*overrides: str) -> int:
        settings = ["parallel.recompute_granularity=null", "parallel.region_alignment=8", *overrides]
        return layer_activation_bytes(configuration("lance_3b.yaml", *settings))

    engine, fp8 = "model.transformer_impl=transformer_engine", "fp8.recipe=tensorwise"
    local, bf16, eight = kept(), kept(engine), kept(engine, fp8, "parallel.region_alignment=16")
    norms = 2 * 2048 * 4  # of each, bytes of 8 that are 4
    assert local - bf16 == rows * (4 * ffn + norms)
    weights = 2 * ((16 + 4) * 128 * 2048 + 2048 * 2048 + 3 * 2048 * ffn)
    assert bf16 - (eight - 2 * weights) == pytest.approx(rows * (ffn + 2 * 2048 + 2048), rel=2e-3)  # eight rows more


def test_gradients_are_quantised_beside_themselves_in_fp8() -> None:
    """In the widest MLP's backward 8 bytes of a row and channel, 4 in bf16 and 4 in FP8, instead of 6 in bf16."""
    plain = ["parallel.recompute_granularity=null", "model.transformer_impl=transformer_engine", "model.num_layers=2"]
    load = PackLoad(ce_rows=100, copied_keys=100_000, und_rows=0.1, gen_rows=0.9)
    runs = [
        configuration("lance_3b.yaml", *plain, "parallel.region_alignment=16", recipe)
        for recipe in ("fp8.recipe=none", "fp8.recipe=tensorwise")
    ]
    bf16, eight = (
        memory_per_rank(run, 1, load)[0].activation_bytes - 2 * layer_activation_bytes(run, load) for run in runs
    )
    assert eight - bf16 == pytest.approx(2 * 11_008 * 0.9 * 50_000, rel=1e-3)  # some rows of padding


def test_an_interleaved_schedule_has_inputs_of_passes_to_come() -> None:
    """Both stages' layers are recomputed, so that inputs are what is kept: 7 or 3 passes of a group each, 2 ahead."""
    full = ["parallel.recompute_granularity=full", "parallel.recompute_num_layers=9", "training.global_batch_size=8"]
    pp, vpp = (f"parallel.{name}pipeline_model_parallel_size=2" for name in ("", "virtual_"))
    plain, interleaved = (
        [one.activation_bytes for one in memory_per_rank(configuration("lance_3b.yaml", *full, *more), 2)]
        for more in ((pp,), (pp, vpp))
    )
    one_input = 2 * 2048 * 50_000
    assert (interleaved[0] - plain[0]) / one_input == pytest.approx(5 + 2 - 2 * 2, abs=0.01)
    assert (interleaved[1] - plain[1]) / one_input == pytest.approx(3 + 2 - 2 * 1, abs=0.01)


def test_the_load_is_the_most_of_any_pack() -> None:
    """Rows of the head, keys and each expert's share may be of different packs."""
    text, picture = Segment.text, Segment.visual(SegmentKind.NOISE, (1, 2, 2))
    packs = [
        pack_of(Sample("talk", Task.T2T, (text(30),), ((2, 30),)), spare=0),
        pack_of(Sample("draw", Task.T2I, (text(3), picture, text(1))), spare=0),
    ]
    batches = [batch_of(pack, values_of(pack), alignment=1)[1] for pack in packs]
    loads = [PackLoad.of([batch]) for batch in batches]
    both = PackLoad.of(batches)
    assert (both.ce_rows, both.und_rows) == (28, loads[0].und_rows) and both.gen_rows == loads[1].gen_rows > 0.3
    assert both.copied_keys == max(load.copied_keys for load in loads) and both.widest_region == both.und_rows


def test_a_line_names_every_part() -> None:
    line = memory_per_rank(configuration("lance_3b.yaml"), 1)[0].line()
    assert line.startswith("pp rank 0: 6,176,817,200 parameters; weights 11.505 GiB, gradients 23.0")
    for part in ("optimizer", "activations", "total"):
        assert part in line
