"""The rules of a configuration: each is broken alone and must say so in one line."""

from __future__ import annotations

import pytest

from megatron_lance.config.loader import ConfigError, load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.config.validate import TASKS, validate
from megatron_lance.packing.sample import Task
from tests.shared import REPOSITORY

TINY = str(REPOSITORY / "examples/configs/tiny.yaml")
SOURCE = "data.sources=[{name: a, path: p, task: t2i}, {name: b, path: p, task: t2v}]"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
FIRST = "parallel.num_layers_in_first_pipeline_stage"
LAST = "parallel.num_layers_in_last_pipeline_stage"


def tiny(*overrides: str) -> RunConfig:
    return load_config([TINY], [SOURCE, *overrides])


def degrees(tp: int = 1, cp: int = 1, pp: int = 1) -> list[str]:
    return [
        f"parallel.tensor_model_parallel_size={tp}",
        f"parallel.context_parallel_size={cp}",
        f"parallel.pipeline_model_parallel_size={pp}",
    ]


def only_problem(config: RunConfig, world_size: int) -> str:
    with pytest.raises(ConfigError) as info:
        validate(config, world_size)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_the_defaults_are_valid() -> None:
    validate(RunConfig(), 1)


def test_tasks_are_those_of_packing() -> None:
    assert set(TASKS) == set(Task)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (4, degrees()),
        (4, degrees(tp=4)),  # more tensor ranks than query groups
        (8, degrees(tp=2, cp=2, pp=2)),
        (8, degrees(tp=2, pp=2)),
        (2, [PP2, VPP2]),
        (2, [PP2, f"{FIRST}=1"]),
        (2, [PP2, f"{LAST}=3"]),
        (2, [PP2, f"{FIRST}=3", f"{LAST}=1"]),
        (4, [*degrees(pp=4), f"{FIRST}=2", f"{LAST}=2", "model.num_layers=8"]),
        (4, [*degrees(pp=4), VPP2, f"{FIRST}=2", f"{LAST}=2", "model.num_layers=12"]),
        (1, ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"]),
        (1, ["parallel.recompute_granularity=full", "optimizer.lr_warmup_iters=19", "data.sources.0.weight=0"]),
        (1, ["data.max_seconds_generation=3", "data.caption_dropout=1", "data.condition_dropout=0"]),
    ],
)
def test_possible_settings(world_size: int, overrides: list[str]) -> None:
    validate(tiny(*overrides), world_size)


def test_degrees_print_the_equation() -> None:
    assert only_problem(tiny(*degrees(tp=2, cp=2)), 6) == (
        "parallel: tp 2 x cp 2 x pp 1 x dp 1 = 4, but world size is 6; "
        "start a multiple of 4 ranks or change the degrees"
    )
    assert "tp 4 x cp 1 x pp 2 x dp 1 = 8, but world size is 2" in only_problem(tiny(*degrees(tp=4, pp=2)), 2)
    assert "tp 2 x cp 2 x pp 1 x dp 2 = 8, but world size is 9" in only_problem(tiny(*degrees(tp=2, cp=2)), 9)


@pytest.mark.parametrize(
    ("world_size", "overrides", "problem"),
    [
        (3, [], "training.global_batch_size = 4: must be divisible by dp 3 = world size 3 / (tp 1 x cp 1 x pp 1)"),
        (1, ["training.micro_batch_size=2"], "training.micro_batch_size = 2: a pack is a micro-batch; set 1"),
        (1, ["data.vae_sides=[848,480]"], "data.vae_sides = [848, 480]: must be the least short side and the greatest"),
        (1, ["data.vit_sides=[28]"], "data.vit_sides = [28]: must be the least short side and the greatest long side"),
        (
            1,
            ["data.max_sample_length=4097"],
            "data.max_sample_length = 4097: must be positive and not above data.seq_length 4096; change it or set null",
        ),
        (1, ["training.freeze=[vit]"], "training.freeze = ['vit']: must be some of embeddings, head, und, each once"),
        (1, ["training.freeze=[und,und]"], "training.freeze = ['und', 'und']: must be some of embeddings, head, und"),
        (
            1,
            ["data.dropout_scheme=paper", "data.caption_dropout=0.75", "data.condition_dropout=0.5"],
            "data.caption_dropout = 0.75: with data.condition_dropout 0.5 is 1.25, but data.dropout_scheme paper drops",
        ),
        (
            2,
            [PP2, VPP2, "training.global_batch_size=3"],
            "training.global_batch_size = 3: with virtual pipeline stages the 3 micro-batches of a replica (dp 1) must "
            "be divisible by pp 2; set a multiple of 2",
        ),
        (1, [VPP2], "parallel.virtual_pipeline_model_parallel_size = 2: needs pp > 1"),
        (2, [PP2, "parallel.virtual_pipeline_model_parallel_size=1"], "must be at least 2; set null"),
        (1, [f"{FIRST}=2"], "parallel.num_layers_in_first_pipeline_stage = 2: needs pp > 1"),
        (2, [PP2, "model.num_layers=5"], "5 = 5 layers must split evenly over 2 pipeline stages x vpp 1"),
        (2, [PP2, VPP2, "model.num_layers=6"], "6 = 6 layers must split evenly over 2 pipeline stages x vpp 2"),
        (2, [PP2, f"{FIRST}=4"], "4 - 4 = 0 layers must split evenly over 1 pipeline stages"),
        (2, [PP2, f"{FIRST}=1", f"{LAST}=1"], "4 - 1 - 1 = 2 layers must split evenly over 0 pipeline stages"),
        (2, [PP2, f"{FIRST}=0"], f"{FIRST} = 0: must be a positive multiple of vpp 1"),
        (2, [PP2, VPP2, f"{LAST}=1", "model.num_layers=5"], f"{LAST} = 1: must be a positive multiple of vpp 2"),
        (1, ["parallel.offload_layers=-1"], "parallel.offload_layers = -1: must not be negative; set 0 or more"),
        (
            1,
            ["parallel.offload_layers=5"],
            "offload_layers = 5: must not exceed the 4 layers of the smallest model chunk",
        ),
        (
            2,
            [PP2, f"{FIRST}=1", "parallel.offload_layers=2"],
            "= 2: must not exceed the 1 layers of the smallest model",
        ),
        (2, [PP2, VPP2, "parallel.offload_layers=2"], "= 2: must not exceed the 1 layers of the smallest model chunk"),
        (
            1,
            ["parallel.offload_layers=1", "parallel.recompute_granularity=full"],
            "parallel.offload_layers = 1: parallel.recompute_granularity=full keeps nothing but layers' inputs; set 0",
        ),
        (1, ["parallel.recompute_experts=[vit]"], "parallel.recompute_experts = ['vit']: must be some of und, gen"),
        (1, ["parallel.recompute_experts=[]"], "parallel.recompute_experts = []: must be some of und, gen"),
        (1, ["parallel.overlap_param_gather=true"], "overlap_param_gather = True: needs"),
        (
            1,
            [
                "parallel.overlap_param_gather=true",
                "parallel.overlap_grad_reduce=true",
                "parallel.use_distributed_optimizer=false",
            ],
            "overlap_param_gather = True: needs parallel.use_distributed_optimizer and parallel.overlap_grad_reduce",
        ),
    ],
)
def test_parallelism(world_size: int, overrides: list[str], problem: str) -> None:
    assert problem in only_problem(tiny(*overrides), world_size)


@pytest.mark.parametrize(
    ("tp", "overrides", "problem"),
    [
        (1, ["model.hidden_size=63"], "model.hidden_size = 63: must be even"),
        (1, ["model.num_query_groups=3"], "num_attention_heads = 4: must be divisible by model.num_query_groups 3"),
        (1, ["model.mrope_section=[2, 3, 4]"], "2 x sum = model.kv_channels 16, but 2 x sum = 18"),
        (1, ["model.mrope_section=[4, 4]"], "must be three counts"),
        (1, ["model.mrope_section=[-1, 4, 5]"], "must be three counts"),
        (1, ["model.mrope_section=[]"], "must be three counts"),
        (2, ["model.num_attention_heads=3", "model.num_query_groups=1"], "num_attention_heads = 3: must be divisible"),
        (2, ["model.ffn_hidden_size=127"], "model.ffn_hidden_size = 127: must be divisible by tp 2"),
        (2, ["model.vocab_size=511"], "model.vocab_size = 511: must be divisible by tp 2"),
        (
            2,
            ["model.num_attention_heads=6", "model.num_query_groups=3"],
            "model.num_query_groups = 3: must be a multiple or a divisor of tp 2",
        ),
    ],
)
def test_model_shapes(tp: int, overrides: list[str], problem: str) -> None:
    assert problem in only_problem(tiny(*degrees(tp=tp), *overrides), tp)


@pytest.mark.parametrize(
    "field",
    [
        "model.mape",
        "model.rope_inv_freq_dtype",
        "model.attention_backend",
        "parallel.recompute_granularity",
        "data.decode",
        "data.frame_sampling",
        "data.sources.0.task",
        "data.sources.1.frame_conditions",
        "encoders.vae",
        "encoders.posterior",
        "encoders.dtype",
        "objective.timestep_distribution",
        "optimizer.lr_decay_style",
        "training.precision",
    ],
)
def test_choices(field: str) -> None:
    assert only_problem(tiny(f"{field}=magic"), 1).startswith(f"{field} = magic: unknown choice; set one of ")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("data.caption_dropout", "1.01", "is a probability"),
        ("data.condition_dropout", "-0.1", "is a probability"),
        ("optimizer.adam_beta1", "1", "must be at least 0 and below 1"),
        ("optimizer.adam_beta2", "-0.1", "must be at least 0 and below 1"),
        ("model.num_layers", "0", "must be positive"),
        ("model.latent_channels", "-48", "must be positive"),
        ("parallel.tensor_model_parallel_size", "0", "must be positive"),
        ("parallel.context_parallel_size", "-2", "must be positive"),
        ("data.seq_length", "0", "must be positive"),
        ("data.target_fps", "0", "must be positive"),
        ("encoders.small_vit_heads", "0", "must be positive"),
        ("objective.timestep_shift", "0", "must be positive"),
        ("optimizer.adam_eps", "0", "must be positive"),
        ("training.global_batch_size", "0", "must be positive"),
        ("training.train_iters", "0", "must be positive"),
        ("training.max_nonfinite_steps", "0", "must be positive"),
        ("data.epochs", "0", "must be positive"),
        ("data.row_group_cache_gb", "0", "must be positive"),
        ("data.row_group_cache_gb", "-1.5", "must be positive"),
        ("data.vae_resolution", "31", "must be at least 32 for every bucket to hold a 16-pixel cell"),
        ("data.vit_resolution", "36", "must be at least 37 for every bucket to hold a 28-pixel cell"),
        ("training.seed", "-1", "must not be negative"),
        ("optimizer.lr", "-1", "must not be negative"),
        ("optimizer.clip_grad", "-1", "must not be negative"),
        ("optimizer.lr_warmup_iters", "-1", "must not be negative"),
        ("objective.ce_weight", "-1", "must not be negative"),
        ("data.sources.1.weight", "-1", "must not be negative"),
        ("optimizer.lr_warmup_iters", "20", "must be below training.train_iters 20 and optimizer.lr_decay_iters 20"),
        ("optimizer.lr_decay_iters", "0", "must be positive"),
        ("optimizer.min_lr", "0.1", "must not exceed optimizer.lr 0.001"),
        ("data.sources.1.name", "a", "must be unique and not empty"),
        ("data.sources.1.name", "''", "must be unique and not empty"),
        ("encoders.small_vit_hidden", "36", "must be divisible by 4 x encoders.small_vit_heads 2"),
        ("data.max_seconds_generation", "3.1", "37 frames at 12.0 fps are 10 latent frames"),
    ],
)
def test_values(field: str, value: str, rule: str) -> None:
    line = only_problem(tiny(f"{field}={value}"), 1)
    assert line.startswith(f"{field} = ")
    assert rule in line


@pytest.mark.parametrize(
    ("path", "cache", "refused"),
    [
        ("data/a", "data/a", True),
        ("data/a", "data/a/cache", True),
        ("data/a/*.parquet", "data/a/x/../cache", True),
        ("file:///data/a", "/data/a/cache", True),
        ("data/a", "data/b", False),
        ("data/a", "data", False),
        ("data/a.parquet", "data/cache", False),
        ("s3://data/a", "data/a", False),
    ],
)
def test_a_cache_of_row_groups_is_not_taken_for_data(path: str, cache: str, refused: bool) -> None:
    config = tiny(f"data.sources.1.path={path!r}", f"data.row_group_cache={cache}")
    if refused:
        assert only_problem(config, 1) == (
            f"data.row_group_cache = {cache}: lies in the folder of data.sources b; name a folder outside it, on a "
            "disk of each node"
        )
    else:
        validate(config, 1)


def test_some_source_needs_weight() -> None:
    assert "every weight is 0" in only_problem(tiny("data.sources.0.weight=0", "data.sources.1.weight=0"), 1)


def test_warm_up_of_a_shorter_decay() -> None:
    assert "lr_decay_iters 5" in only_problem(tiny("optimizer.lr_decay_iters=5", "optimizer.lr_warmup_iters=6"), 1)


def test_all_problems_are_told_at_once() -> None:
    config = tiny("model.hidden_size=63", "training.micro_batch_size=2", "optimizer.min_lr=1")
    with pytest.raises(ConfigError) as info:
        validate(config, 1)
    assert [line.split(" = ")[0] for line in str(info.value).splitlines()] == [
        "training.micro_batch_size",
        "model.hidden_size",
        "optimizer.min_lr",
    ]
