"""TransformerEngine as it is installed: what is called of it, and layers built of its modules; no kernel runs.

Wherever it can be imported, with a GPU or without.  Its modules refuse to be built without a GPU; here they are told
that there is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_lance.checkpoint.hf_lance import RandomSource
from megatron_lance.checkpoint.manifest import DP_RESHARDABLE, Checkpoint, DataIdentity, Manifest
from megatron_lance.checkpoint.store import TrainingState, load, state_tree
from megatron_lance.config.schema import Fp8Config, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_lance.model import layer_specs
from megatron_lance.model.lance_model import LanceModel, build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.objectives.losses import LossCounts
from megatron_lance.ops import attention_te
from megatron_lance.ops.attention_varlen import VarlenCall, varlen_calls
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.parallel import cpu_rehearsal
from megatron_lance.parallel.groups import Groups
from megatron_lance.training.setup import Trainee, optimizer_in_use
from megatron_lance.training.setup import build as build_trainee
from megatron_lance.training.step import forward_backward
from megatron_lance.training.update import update
from tests.unit.tiny_model import TOKENIZER_SIZE, batch_of, mixed_pack, one_rank, values_of, with_model

REASON = "needs TransformerEngine, which cannot be imported"
te = pytest.importorskip("transformer_engine.pytorch", reason=REASON, exc_type=ImportError)
tex = pytest.importorskip("transformer_engine_torch", reason=REASON, exc_type=ImportError)
recipes = pytest.importorskip("transformer_engine.common.recipe", reason=REASON, exc_type=ImportError)

ENGINE, LOCAL = with_model(transformer_impl="transformer_engine"), with_model()
RECIPES = {
    "delayed": "DelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


class WithGpu:
    """A module, torch or torch.cuda, that says there is a GPU."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        if name == "is_available":
            return lambda: True
        return WithGpu(torch.cuda) if name == "cuda" else getattr(self.module, name)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[Groups]:
    if not torch.cuda.is_available():
        monkeypatch.setattr(layer_specs, "check_transformer_engine", lambda recipe="none": None)
        monkeypatch.setattr("transformer_engine.pytorch.module.base.torch", WithGpu(torch))
        monkeypatch.setattr("transformer_engine.pytorch.quantization.get_default_fp8_recipe", recipes.DelayedScaling)
    with one_rank() as groups:
        for module, name, value in cpu_rehearsal.replaced:  # the optimizer too is the one for GPUs
            monkeypatch.setattr(module, name, value)
        yield groups


# ---- attention


def parameters(function: Any) -> list[str]:
    """Types of the parameters of a compiled function, as its documentation has them."""
    (inside,) = re.findall(r"^\w+\((.*)\) -> ", str(function.__doc__), re.MULTILINE)
    return re.split(r",? ?arg\d+: ", inside)[1:]


def takes(value: object, kind: str) -> bool:
    """Whether a compiled function's parameter of this type takes a value."""
    known: dict[str, type | tuple[type, ...]] = {
        "bool": bool,
        "typing.SupportsInt": int,
        "typing.SupportsFloat": float,
        "torch.Tensor": torch.Tensor,
        "torch.Tensor | None": (torch.Tensor, type(None)),
        "torch.Generator | None": (torch.Generator, type(None)),
        "torch.dtype": torch.dtype,
        "object": object,
    }
    if kind in known:
        return isinstance(value, known[kind])
    if kind.startswith("collections.abc.Sequence"):
        return isinstance(value, (list, tuple))
    return type(value).__name__ == kind.removeprefix("transformer_engine_torch.")


def recorder(function: Any, result: Any, seen: list[str]) -> Any:
    kinds = parameters(function)

    def record(*values: object) -> Any:
        assert [kind for value, kind in zip(values, kinds, strict=True) if not takes(value, kind)] == []
        seen.append(function.__name__)
        return result(values) if callable(result) else result

    return record


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_called_with_what_the_compiled_functions_take(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = AttentionPlan.from_pack(mixed_pack())
    (call,) = (call for call in varlen_calls(plan, torch.device("cpu")) if call.causal == causal)
    assert isinstance(call, VarlenCall)
    q = torch.zeros(len(call.query_rows), 16, 128, dtype=torch.bfloat16)
    k, v = (torch.zeros(len(call.key_tokens), 2, 128, dtype=torch.bfloat16) for _ in range(2))
    statistics, random = torch.zeros(len(q), 16, 1), torch.zeros(2, dtype=torch.int64)
    seen: list[str] = []
    results = {
        "get_fused_attn_backend": tex.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen,
        "fused_attn_fwd": [q, statistics, random],
        "fused_attn_bwd": [q, k, v],
    }
    for name, result in results.items():
        monkeypatch.setattr(tex, name, recorder(getattr(tex, name), result, seen))
    attention_te._cudnn.cache_clear()
    kernel = attention_te.FusedKernel()
    out, state = kernel.forward(q, k, v, call, True)
    assert out is q and [s.shape for s in state] == [statistics.shape, random.shape]
    assert [g.shape for g in kernel.backward(q, q, k, v, out, state, call)] == [q.shape, k.shape, v.shape]
    assert seen == ["get_fused_attn_backend", "fused_attn_fwd", "fused_attn_bwd"]
    assert kernel.forward(q, k, v, call, False)[1] == ()
    attention_te._cudnn.cache_clear()


# ---- settings


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_those_of_the_configuration(recipe: str, groups: Groups) -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    fp8 = Fp8Config(recipe, "e4m3", margin=1, amax_history_len=16, amax_compute_algo="most_recent")
    found = get_fp8_recipe(transformer_config(ENGINE, ParallelConfig(), "bf16", fp8))
    assert type(found).__name__.removeprefix("TE") == RECIPES[recipe] and found.fp8_format.name == "E4M3"
    if recipe == "delayed":
        assert (found.margin, found.amax_history_len, found.amax_compute_algo) == (1, 16, "most_recent")


def test_layers_can_leave_fp8(groups: Groups) -> None:
    """Of all recipes but delayed scaling, and the one context is entered for many regions."""
    found = {
        recipe: layer_specs.parts_of(transformer_config(ENGINE, ParallelConfig(), "bf16", Fp8Config(recipe)))
        for recipe in ("none", *RECIPES)
    }
    assert {recipe for recipe, parts in found.items() if parts.without_fp8} == {"tensorwise", "blockwise", "mxfp8"}


def test_adam_is_transformer_engines(groups: Groups) -> None:
    assert optimizer_in_use() == "FusedAdam of TransformerEngine"


# ---- layers


def model_of(model: ModelConfig) -> LanceModel:
    (stage,) = build_stages(transformer_config(model, ParallelConfig(), "bf16"), model, TOKENIZER_SIZE)
    return stage


def test_parameters_and_what_checkpoints_call_them_are_those_of_the_local_spec(groups: Groups) -> None:
    engine, local = model_of(ENGINE), model_of(LOCAL)
    assert type(engine.decoder.layers[0].gen.mlp.linear_fc1).__mro__[2] is te.Linear
    for a, b in zip(engine.named_parameters(), local.named_parameters(), strict=True):
        assert (a[0], a[1].shape, a[1].dtype) == (b[0], b[1].shape, b[1].dtype)
        for mark in ("tensor_model_parallel", "sequence_parallel", "allreduce"):
            assert bool(getattr(a[1], mark, mark == "allreduce")) == bool(getattr(b[1], mark, mark == "allreduce"))
    keys = [
        {name: value.key for name, value in stage.sharded_state_dict().items() if "_extra_state" not in name}
        for stage in (engine, local)
    ]
    assert keys[0] == keys[1]


def trainee(model: ModelConfig, groups: Groups, seed: int) -> tuple[RunConfig, Trainee, TrainingState]:
    run = RunConfig(model=model, training=TrainingConfig(precision="bf16"))
    built = build_trainee(run, groups, TOKENIZER_SIZE, RandomSource(seed, model))
    return run, built, TrainingState(built.chunks, built.optimizer, built.scheduler, ())


def linears(built: Trainee) -> Sequence[Any]:
    return [module for module in built.stages[0].modules() if isinstance(module, te.Linear)]


def remember(linear: Any) -> None:
    """What delayed scaling has after some steps."""
    linear.fp8_meta |= {"recipe": recipes.DelayedScaling(amax_history_len=4), "num_gemms": 1, "fp8_checkpoint": True}
    linear.init_fp8_meta_tensors(linear.fp8_meta["recipe"])
    linear.fp8_meta["scaling_fwd"].scale.fill_(7)
    linear.fp8_meta["scaling_bwd"].amax_history.fill_(5)


@pytest.mark.parametrize(("written", "read"), [(LOCAL, ENGINE), (ENGINE, LOCAL), (ENGINE, ENGINE)])
def test_checkpoints_are_interchangeable(
    written: ModelConfig, read: ModelConfig, groups: Groups, tmp_path: Path
) -> None:
    run, first, state = trainee(written, groups, 1)
    state_tree(state, DP_RESHARDABLE, is_loading=False)
    for moments in first.optimizer.chained_optimizers[0].optimizer.state.values():
        moments["exp_avg"].fill_(3.0)
    for linear in linears(first):
        remember(linear)
    (tmp_path / "saved").mkdir()
    dist_checkpointing.save(state_tree(state, DP_RESHARDABLE, is_loading=False), str(tmp_path / "saved"))
    manifest = Manifest.of(tmp_path / "saved", run, 5, 1, DataIdentity("", ""), {}, optimizer=DP_RESHARDABLE)
    _, second, other = trainee(read, groups, 2)
    load(Checkpoint(tmp_path / "saved", manifest), other)
    for a, b in zip(first.stages[0].parameters(), second.stages[0].parameters(), strict=True):
        assert torch.equal(a, b)
    moments = [s["exp_avg"] for s in second.optimizer.chained_optimizers[0].optimizer.state.values()]
    assert moments and all((m == 3.0).all() for m in moments)
    for linear in linears(second):
        if written is LOCAL:
            assert "scaling_fwd" not in linear.fp8_meta
        else:
            assert (linear.fp8_meta["scaling_fwd"].scale == 7).all()
            assert (linear.fp8_meta["scaling_bwd"].amax_history == 5).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU it is not used; there is one")
def test_without_a_gpu_models_train_as_if_it_were_not_there() -> None:
    pack = mixed_pack()
    run = RunConfig(model=LOCAL, training=TrainingConfig(precision="bf16", global_batch_size=1))
    with one_rank() as groups:
        trainee = build_trainee(run, groups, TOKENIZER_SIZE, RandomSource(1, LOCAL))
        assert optimizer_in_use() == "Adam of torch"
        before = [p.detach().clone() for p in trainee.stages[0].parameters()]
        batch = batch_of(pack, values_of(pack))[1].to(torch.device("cpu"), torch.bfloat16)
        own = forward_backward(trainee, [batch], LossCounts.of([pack]), run.objective, groups, broken=0)
        update(trainee, own)
        assert any(not torch.equal(a, b) for a, b in zip(before, trainee.stages[0].parameters(), strict=True))
        assert state_tree(
            TrainingState(trainee.chunks, trainee.optimizer, trainee.scheduler, ()), DP_RESHARDABLE, False
        )
