"""Freeze sets: what belongs to them, and that frozen weights cost neither gradient nor optimizer state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_lance.checkpoint.hf_lance import RandomSource, bindings, global_parameters
from megatron_lance.config import validate
from megatron_lance.config.schema import RunConfig, TrainingConfig
from megatron_lance.model.freeze import FREEZE_SETS, is_frozen
from megatron_lance.profiling.memory import memory_per_rank
from megatron_lance.training.setup import Trainee, build
from tests.unit.tiny_model import TINY, TOKENIZER_SIZE, one_rank

ALL = tuple(FREEZE_SETS)
TRAINED_OUTSIDE_LAYERS = {
    *("embedder.vae2llm.weight", "embedder.vae2llm.bias", "heads.llm2vae.weight", "heads.llm2vae.bias"),
    *(f"embedder.time_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")),
    "heads.gen_norm.weight",
}


def run_with(*sets: str, **training: object) -> RunConfig:
    return RunConfig(model=TINY, training=TrainingConfig(precision="float32", freeze=sets, **training))  # type: ignore[arg-type]


def test_the_sets_are_those_of_the_configuration() -> None:
    assert ALL == validate.FREEZE_SETS


def test_all_sets_leave_the_generation_expert_and_the_connectors() -> None:
    trained = {name for name in bindings(TINY) if not is_frozen(name, ALL)}
    inside = {name for name in trained if name.startswith("decoder.layers.")}
    assert trained - inside == TRAINED_OUTSIDE_LAYERS
    assert inside and all(".gen." in name for name in inside)
    for layer in range(TINY.num_layers):  # every pipeline stage has something to train
        assert any(name.startswith(f"decoder.layers.{layer}.") for name in inside)


def optimizer_values(trainee: Trainee) -> int:
    return sum(p.numel() for group in trainee.optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("sets", [(), ("embeddings",), ("head",), ("und",), ALL])
@pytest.mark.parametrize("distributed", [True, False])
def test_frozen_weights_have_no_gradient_and_no_optimizer_state(sets: tuple[str, ...], distributed: bool) -> None:
    run = run_with(*sets)
    run = replace(run, parallel=replace(run.parallel, use_distributed_optimizer=distributed))
    with one_rank() as groups:
        trainee = build(run, groups, TOKENIZER_SIZE, RandomSource(3, TINY))
        parameters = dict(global_parameters(trainee.stages))
        frozen = {name for name in parameters if is_frozen(name, sets)}
        assert bool(frozen) == bool(sets)
        for name, parameter in parameters.items():
            assert parameter.requires_grad == hasattr(parameter, "main_grad") == (name not in frozen)
        trained = sum(p.numel() for name, p in parameters.items() if name not in frozen)
        assert optimizer_values(trainee) == trained
        assert sum(p.numel() for chunk in trainee.chunks for p in chunk.params_with_grad) == trained
    (memory,) = memory_per_rank(run, 1)
    assert memory.parameters == sum(p.numel() for p in parameters.values())
    assert (memory.trained, memory.gradient_bytes, memory.optimizer_bytes) == (trained, 4 * trained, 8 * trained)
    assert memory.weight_bytes == 4 * memory.parameters
    assert ("frozen)" in memory.line()) == bool(sets)


def test_a_frozen_expert_has_no_average() -> None:
    with one_rank() as groups:
        trainee = build(run_with(*ALL, ema_decay=0.9), groups, TOKENIZER_SIZE, RandomSource(3, TINY))
        assert trainee.average is not None
        averaged = {id(shard.parameter) for shard in trainee.average.shards}
        assert averaged == {id(p) for name, p in global_parameters(trainee.stages) if not is_frozen(name, ALL)}
        assert all(torch.equal(s.data, s.parameter.detach().flatten()) for s in trainee.average.shards)
