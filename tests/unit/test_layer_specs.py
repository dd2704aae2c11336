"""Layer specs: what a part with a state of its own may do to checkpoints, and which linears leave FP8.

TransformerEngine computes on GPUs alone (tests/gpu), and may not be there (test_transformer_engine_import.py).  Parts
stand in for its here that are megatron-core's linears but, like its linears and norms, remember something beside their
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_lance.checkpoint.hf_lance import RandomSource
from megatron_lance.checkpoint.manifest import DP_RESHARDABLE, Checkpoint, DataIdentity, Manifest, StoreError
from megatron_lance.checkpoint.store import TrainingState, load, load_model, state_tree
from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import Fp8Config, ParallelConfig, RunConfig, TrainingConfig
from megatron_lance.model.lance_model import LanceModel, build_stages
from megatron_lance.model.layer_specs import LOCAL, Parts, RMSNorm, parts_of
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.parallel.groups import Groups
from megatron_lance.training.setup import Trainee, optimizer_in_use
from megatron_lance.training.setup import build as build_trainee
from tests.unit.tiny_model import (
    TINY,
    TOKENIZER_SIZE,
    batch_of,
    forward_backward,
    mixed_pack,
    one_rank,
    pack_of,
    values_of,
    with_model,
)


class Remembers:
    """A number beside the weights, as bytes in checkpoints like TransformerEngine's state."""

    remembered = 0

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.remembered], dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        self.remembered = 0 if state is None else int(state[0])


class Column(Remembers, ColumnParallelLinear): ...


class Row(Remembers, RowParallelLinear): ...


class Norm(Remembers, RMSNorm): ...


ENGINE = Parts(Norm, Column, Row)
RUN = RunConfig(model=TINY, training=TrainingConfig(precision="bf16"))


@pytest.fixture
def groups() -> Iterator[Groups]:
    with one_rank() as groups:
        yield groups


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes models of these parts from now on."""
    return lambda parts: monkeypatch.setattr("megatron_lance.model.lance_model.parts_of", lambda config: parts)


def trainee(groups: Groups, seed: int) -> tuple[Trainee, TrainingState]:
    built = build_trainee(RUN, groups, TOKENIZER_SIZE, RandomSource(seed, TINY))
    return built, TrainingState(built.chunks, built.optimizer, built.scheduler, ())


def saved(built: Trainee, state: TrainingState, folder: Path) -> Checkpoint:
    """A checkpoint of a state whose every optimizer moment is 3 and whose parts remember 7."""
    tree = state_tree(state, DP_RESHARDABLE, is_loading=False)
    for moments in built.optimizer.chained_optimizers[0].optimizer.state.values():
        moments["exp_avg"].fill_(3.0)
    for module in built.stages[0].modules():
        if isinstance(module, Remembers):
            module.remembered = 7
    tree = state_tree(state, DP_RESHARDABLE, is_loading=False)
    folder.mkdir()
    dist_checkpointing.save(tree, str(folder))
    manifest = Manifest.of(folder, RUN, 5, 1, DataIdentity("", ""), {}, optimizer=DP_RESHARDABLE)
    return Checkpoint(folder, manifest)


@pytest.mark.parametrize(
    ("written", "read", "remembered"),
    [(LOCAL, ENGINE, 0), (ENGINE, LOCAL, None), (ENGINE, ENGINE, 7)],
    ids=["from local", "to local", "of its own"],
)
def test_a_state_beside_the_weights_is_kept_but_never_asked_for(
    written: Parts, read: Parts, remembered: int | None, use: Any, groups: Groups, tmp_path: Path
) -> None:
    use(written)
    first, state = trainee(groups, seed=1)
    checkpoint = saved(first, state, tmp_path / "checkpoint")
    use(read)
    second, other = trainee(groups, seed=2)
    names = [(name, p.shape) for name, p in first.stages[0].named_parameters()]
    assert [(name, p.shape) for name, p in second.stages[0].named_parameters()] == names
    load(checkpoint, other)
    for a, b in zip(first.stages[0].parameters(), second.stages[0].parameters(), strict=True):
        assert torch.equal(a, b)
    moments = [s["exp_avg"] for s in second.optimizer.chained_optimizers[0].optimizer.state.values()]
    assert moments and all((m == 3.0).all() for m in moments)
    held = {m.remembered for m in second.stages[0].modules() if isinstance(m, Remembers)}
    assert held == (set() if remembered is None else {remembered})


def test_a_model_takes_weights_of_other_parts(use: Any, groups: Groups, tmp_path: Path) -> None:
    use(ENGINE)
    first, state = trainee(groups, seed=1)
    checkpoint = saved(first, state, tmp_path / "checkpoint")
    use(LOCAL)
    stages = build_stages(transformer_config(TINY, ParallelConfig(), "bf16"), TINY, TOKENIZER_SIZE)
    load_model(checkpoint, stages)
    assert all(torch.equal(a, b) for a, b in zip(first.stages[0].parameters(), stages[0].parameters(), strict=True))


def test_a_checkpoint_without_some_weights_is_refused(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, state = trainee(groups, seed=1)
    checkpoint = saved(built, state, tmp_path / "checkpoint")
    whole = LanceModel.sharded_state_dict

    def renamed(self: LanceModel, *args: Any, **kwargs: Any) -> Any:
        tree = whole(self, *args, **kwargs)
        tree["heads.llm2vae.bias"].key = "heads.llm2vae.other"
        return tree

    monkeypatch.setattr(LanceModel, "sharded_state_dict", renamed)
    with pytest.raises(StoreError, match="holds another model, without heads.llm2vae.other"):
        load(checkpoint, state)


# ---- precision of a region


def test_the_linears_of_a_small_region_leave_fp8(use: Any, groups: Groups) -> None:
    """Packs with VAE tokens and without; what leaves FP8 follows from the layout alone."""
    outside = [False]

    @contextmanager
    def without_fp8() -> Iterator[None]:
        outside[0] = True
        yield
        outside[0] = False

    seen: set[tuple[str, bool]] = set()
    use(Parts(RMSNorm, ColumnParallelLinear, RowParallelLinear, without_fp8=without_fp8))
    (model,) = build_stages(transformer_config(TINY, ParallelConfig(), "float32"), TINY, TOKENIZER_SIZE)
    for layer in model.decoder.layers:
        for expert, of_expert in (("und", layer.und), ("gen", layer.gen)):
            for module in of_expert.modules():
                if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                    module.register_forward_pre_hook(lambda *_, expert=expert: seen.add((expert, outside[0])))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    text = pack_of(mixed_pack().samples[3])
    for pack, alignment, expected in (
        (mixed_pack(), 4, {("und", False), ("gen", False)}),
        (mixed_pack(), 16, {("und", False), ("gen", True)}),
        (text, 4, {("und", False), ("gen", True)}),
        (text, 16, {("und", True), ("gen", True)}),
    ):
        layout, batch = batch_of(pack, values_of(pack), alignment)
        seen.clear()
        forward_backward(model, pack, batch)
        assert seen == expected, (layout.describe(), alignment)
        assert batch.small == (("und", True) in expected, ("gen", True) in expected)


# ---- settings


def test_fp8_in_megatron_cores_terms() -> None:
    fp8 = Fp8Config("tensorwise", "e4m3", first_layers_bf16=1, last_layers_bf16=0)
    config = transformer_config(with_model(transformer_impl="transformer_engine"), ParallelConfig(), "bf16", fp8)
    assert (config.fp8, config.fp8_recipe, config.transformer_impl) == ("e4m3", "tensorwise", "transformer_engine")
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 0)
    delayed = transformer_config(TINY, ParallelConfig(), "bf16", Fp8Config("delayed", margin=1, amax_history_len=16))
    assert (delayed.fp8_margin, delayed.fp8_amax_history_len, delayed.fp8_amax_compute_algo) == (1, 16, "max")
    assert not delayed.first_last_layers_bf16
    assert transformer_config(TINY, ParallelConfig(), "bf16").fp8 is None


def test_passes_without_gradients_leave_fp8(use: Any, groups: Groups) -> None:
    use(LOCAL)
    built = build_trainee(replace(RUN, fp8=Fp8Config("delayed")), groups, TOKENIZER_SIZE, RandomSource(1, TINY))
    with built.at_rest(averaged=False):
        assert built.config.fp8 is None and built.stages[0].decoder.config is built.config
    assert built.config.fp8 == "hybrid"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_transformer_engine_without_a_gpu_is_refused(groups: Groups) -> None:
    config = transformer_config(with_model(transformer_impl="transformer_engine"), ParallelConfig(), "bf16")
    with pytest.raises(
        UserError, match="model.transformer_impl = transformer_engine: needs TransformerEngine on a GPU"
    ):
        parts_of(config)


def test_which_adam_serves_is_said() -> None:
    def adam_of(module: str) -> type:
        return type("Adam", (), {"__module__": module})

    assert optimizer_in_use(adam_of("transformer_engine.pytorch.optimizers.fused_adam")).endswith("TransformerEngine")
    assert optimizer_in_use(adam_of("apex.optimizers.fused_adam")) == "FusedAdam of apex"
    assert optimizer_in_use(torch.optim.AdamW) == "Adam of torch"
