"""TransformerEngine's layers against megatron-core's, and FP8: linears, regions, recompute, checkpoints, training.

Errors are measured against float32; that of TransformerEngine in bf16 may be twice that of torch in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from torch import nn

from megatron_lance.checkpoint.hf_lance import RandomSource, load_weights
from megatron_lance.checkpoint.manifest import DP_RESHARDABLE, Checkpoint, DataIdentity, Manifest
from megatron_lance.checkpoint.store import TrainingState, load, state_tree
from megatron_lance.config.errors import UserError
from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.schema import Fp8Config, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_lance.model import offload
from megatron_lance.model.lance_model import LanceModel, build_stages
from megatron_lance.model.layer_specs import check_transformer_engine
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.objectives.losses import LossCounts
from megatron_lance.ops.head_cross_entropy import head_cross_entropy, head_logits
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.positions import Mape
from megatron_lance.packing.sample import Pack
from megatron_lance.parallel.dispatch import RankBatch, rank_batch
from megatron_lance.parallel.groups import Groups
from megatron_lance.training.setup import Trainee, optimizer_in_use
from megatron_lance.training.setup import build as build_trainee
from megatron_lance.training.step import forward as without_gradients
from megatron_lance.training.step import forward_backward as train_step
from tests.strategies import pack_values
from tests.unit.tiny_model import TOKENIZER_SIZE, Result, forward_backward, mixed_pack, one_rank, pack_of, with_model


def why_not() -> str:
    """Why these tests cannot run here; empty if they can."""
    try:
        check_transformer_engine()
    except UserError as error:
        return str(error).split("; ")[0]
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_not()), reason=why_not())]

MODEL = with_model(
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    mrope_section=(4, 6, 6),
    transformer_impl="transformer_engine",
)
LOCAL = replace(MODEL, transformer_impl="local")
ON_HOPPER = ("delayed", "tensorwise", "blockwise")
PACK = pack_of(*mixed_pack().samples * 4)
"""Both regions have rows enough for every recipe."""
TEXT = pack_of(*(mixed_pack().samples[3],) * 4)


@pytest.fixture
def groups() -> Iterator[Groups]:
    """One rank; what delayed scaling remembers of its modules is forgotten behind it."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    with one_rank() as groups:
        yield groups
    FP8GlobalStateManager.reset()


def skip_unless_served(recipe: str) -> None:
    """Blockwise scaling needs Hopper and CUDA 12.9, MXFP8 Blackwell."""
    try:
        check_transformer_engine(recipe)
    except UserError as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class Setting:
    """How a model computes.

    Attributes:
        engine: whether its layers are TransformerEngine's.
        recipe: of FP8.
        precision: of its parameters.
        recompute: granularity.
        modules: of selective recompute.
        experts: that recompute norms and MLP.
        offload: layers whose saved tensors wait on the host.
        first_bf16: layers at the start that stay in bf16.
        attention: backend.
    """

    engine: bool = True
    recipe: str = "none"
    precision: str = "bf16"
    recompute: str | None = None
    modules: tuple[str, ...] = ("core_attn",)
    experts: tuple[str, ...] = ("und", "gen")
    offload: int = 0
    first_bf16: int = 0
    attention: str = "sdpa"

    @property
    def run(self) -> RunConfig:
        """The configuration of a run."""
        return RunConfig(
            model=replace(MODEL if self.engine else LOCAL, attention_backend=self.attention),
            fp8=Fp8Config(self.recipe, amax_history_len=16, first_layers_bf16=self.first_bf16),
            parallel=ParallelConfig(
                recompute_granularity=self.recompute,
                recompute_modules=self.modules,
                recompute_experts=self.experts,
                offload_layers=self.offload,
            ),
            optimizer=OptimizerConfig(lr=1e-4, adam_eps=1e-8),
            training=TrainingConfig(precision=self.precision),
        )


def model_of(setting: Setting) -> LanceModel:
    """Random weights that depend on names alone; without gradient buffers, so linears cannot add to them."""
    run = setting.run
    config = transformer_config(run.model, run.parallel, setting.precision, run.fp8)
    config.gradient_accumulation_fusion = False
    (stage,) = build_stages(config, run.model, TOKENIZER_SIZE)
    load_weights([stage], RandomSource(3, run.model), run.model, tp_rank=0, tp=1)
    return stage


def batch_of(pack: Pack, setting: Setting, groups: Groups, seed: int = 0) -> RankBatch:
    values = pack_values(
        pack, seed, vocabulary=TOKENIZER_SIZE, hidden=MODEL.hidden_size, channels=MODEL.latent_channels
    )
    layout = Layout.build(pack, 1, 1, row_alignment(setting.run))
    batch = rank_batch(pack, layout, *values, mape=Mape.RELEASE, mape_step=1000, cp_rank=0, tp_rank=0)
    return batch.to(groups.device, torch.float32 if setting.precision == "float32" else torch.bfloat16)


def once(setting: Setting, groups: Groups, pack: Pack | None = None) -> tuple[LanceModel, Result]:
    """A model after one forward and backward, and what that gave."""
    model, pack = model_of(setting), pack or PACK
    return model, forward_backward(model, pack, batch_of(pack, setting, groups))


def flat(result: Result) -> torch.Tensor:
    """All gradients as one float32 vector."""
    return torch.cat([g.float().flatten() for _, g in sorted(result.gradients.items()) if g is not None])


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def linears(model: LanceModel, expert: str, layer: int) -> list[Any]:
    of_expert = getattr(model.decoder.layers[layer], expert)
    attention, mlp = of_expert.self_attention, of_expert.mlp
    return [attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2]


# ---- one pass


def test_parameters_are_the_same(groups: Groups) -> None:
    engine, local = (model_of(Setting(engine=engine)) for engine in (True, False))
    names = [[(name, p.shape, p.dtype) for name, p in model.named_parameters()] for model in (engine, local)]
    assert names[0] == names[1]
    for a, b in zip(engine.parameters(), local.parameters(), strict=True):
        for mark in ("tensor_model_parallel", "sequence_parallel", "allreduce"):
            assert bool(getattr(a, mark, mark == "allreduce")) == bool(getattr(b, mark, mark == "allreduce"))


def test_bf16_is_as_near_to_float32_as_torch(groups: Groups) -> None:
    exact, torchs, engines = (
        once(setting, groups)[1] for setting in (Setting(False, precision="float32"), Setting(False), Setting())
    )
    assert apart(flat(engines), flat(exact)) <= 2 * apart(flat(torchs), flat(exact))
    for name in ("ce", "velocity"):
        values = [getattr(result.outputs, name).detach() for result in (engines, torchs, exact)]
        assert apart(values[0], values[2]) <= 2 * apart(values[1], values[2]), name


@pytest.mark.parametrize("recipe", [*ON_HOPPER, "mxfp8"])
def test_fp8_is_near_bf16(recipe: str, groups: Groups) -> None:
    skip_unless_served(recipe)
    _, half = once(Setting(), groups)
    model, quarter = once(Setting(recipe=recipe), groups)
    assert all(linear.fp8 for expert in ("und", "gen") for linear in linears(model, expert, 0))
    assert 0 < apart(quarter.loss, half.loss) < 0.05
    assert torch.isfinite(flat(quarter)).all()
    assert torch.cosine_similarity(flat(quarter), flat(half), dim=0) > 0.95


@pytest.mark.parametrize(("recipe", "stays"), [("tensorwise", False), ("delayed", True)])
def test_a_region_too_small_for_fp8(recipe: str, stays: bool, groups: Groups) -> None:
    """A pack of text has no VAE token: the generation expert sees padding, and leaves FP8 unless scaling is delayed.

    Nobody looks at the rows; what they compute in must not change the rest.
    """
    model, result = once(Setting(recipe=recipe), groups, TEXT)
    assert all(linear.fp8 for linear in linears(model, "und", 0))
    assert {linear.fp8 for linear in linears(model, "gen", 0)} == {stays}
    assert torch.isfinite(flat(result)).all()


def test_the_first_layers_stay_in_bf16(groups: Groups) -> None:
    model, _ = once(Setting(recipe="tensorwise", first_bf16=1), groups)
    assert [linears(model, "und", layer)[0].fp8 for layer in range(MODEL.num_layers)] == [False, True]


@pytest.mark.parametrize(
    ("recipe", "granularity", "modules"),
    [
        ("none", "full", ()),
        ("tensorwise", "full", ()),
        ("tensorwise", "selective", ("core_attn", "layernorm", "mlp")),
        ("blockwise", "selective", ("mlp",)),
        ("delayed", "full", ()),
        ("delayed", "selective", ("core_attn", "mlp")),
    ],
)
def test_recompute_changes_nothing(recipe: str, granularity: str, modules: tuple[str, ...], groups: Groups) -> None:
    skip_unless_served(recipe)
    _, kept = once(Setting(recipe=recipe), groups)
    setting = Setting(recipe=recipe, recompute=granularity, modules=modules or ("core_attn",))
    _, again = once(setting, groups)
    assert apart(again.loss, kept.loss) < 1e-6 and apart(flat(again), flat(kept)) < 1e-3


@pytest.mark.parametrize("modules", [(), ("core_attn", "mlp"), ("layernorm", "mlp")])
@pytest.mark.parametrize("recipe", ["none", *ON_HOPPER])
def test_offload_changes_nothing(
    recipe: str, modules: tuple[str, ...], groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised tensors travel too.  What is recomputed of one expert has the same gradients as well."""
    skip_unless_served(recipe)
    if recipe == "delayed" and "layernorm" in modules:
        pytest.skip("delayed scaling refuses recompute of norms")
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    again = Setting(recipe=recipe, recompute="selective" if modules else None, modules=modules or ("core_attn",))
    _, kept = once(again, groups)
    for setting in (replace(again, offload=1), replace(again, offload=2, experts=("gen",))):
        model, result = once(setting, groups)
        assert apart(result.loss, kept.loss) < 1e-6 and apart(flat(result), flat(kept)) < 1e-3
        assert model.offload is not None and model.offload.host_bytes == 0


# ---- training


def trainee_of(setting: Setting, groups: Groups, seed: int = 1) -> Trainee:
    run = setting.run
    return build_trainee(run, groups, TOKENIZER_SIZE, RandomSource(seed, run.model))


def losses(
    trainee: Trainee, packs: Sequence[Pack], batches: Sequence[RankBatch], steps: int, groups: Groups
) -> list[float]:
    """Loss of each step, every one over all packs."""
    counts, objective = LossCounts.of(packs), RunConfig().objective
    found = []
    for _ in range(steps):
        own = train_step(trainee, batches, counts, objective, groups, broken=0)
        trainee.scheduler.step(1)
        trainee.optimizer.step()
        found.append(own.total(own.values.cpu()).total)
    return found


def test_adam_is_transformer_engines() -> None:
    assert optimizer_in_use() == "FusedAdam of TransformerEngine"


def test_gradients_added_by_the_linears_are_those_of_autograd(groups: Groups) -> None:
    """The first step's gradient norm, over two micro-batches, of both layer specs."""
    packs, norms = [PACK, TEXT], []
    for setting in (Setting(), Setting(engine=False)):
        trainee = trainee_of(setting, groups)
        assert trainee.config.gradient_accumulation_fusion == setting.engine
        batches = [batch_of(pack, setting, groups) for pack in packs]
        train_step(trainee, batches, LossCounts.of(packs), RunConfig().objective, groups, broken=0)
        norms.append(float(trainee.optimizer.step()[1]))
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


CURVES: dict[Setting, list[float]] = {}
"""Loss curves that are there already."""


def curve(setting: Setting, groups: Groups) -> list[float]:
    """Loss of 200 steps over the same two packs."""
    if setting not in CURVES:
        packs = [PACK] * 2
        batches = [batch_of(pack, setting, groups, seed) for seed, pack in enumerate(packs)]
        CURVES[setting] = losses(trainee_of(setting, groups), packs, batches, 200, groups)
    return CURVES[setting]


@pytest.mark.parametrize("recipe", ON_HOPPER)
def test_a_loss_curve_in_fp8_is_that_of_bf16(
    recipe: str, groups: Groups, record_property: Callable[[str, object], None]
) -> None:
    """What is trained on is learnt by heart, so differences count against the first loss."""
    skip_unless_served(recipe)
    half, quarter = (curve(setting, groups) for setting in (Setting(), Setting(recipe=recipe)))
    off = max(abs(b - a) for a, b in zip(half, quarter, strict=True)) / half[0]
    record_property("greatest difference over the first loss", off)
    record_property("every tenth loss in bf16", half[::10])
    record_property(f"every tenth loss, {recipe}", quarter[::10])
    assert half[-1] < 0.7 * half[0]
    assert off < 0.03


def saved(trainee: Trainee, setting: Setting, folder: Path) -> Checkpoint:
    state = TrainingState(trainee.chunks, trainee.optimizer, trainee.scheduler, ())
    folder.mkdir()
    dist_checkpointing.save(state_tree(state, DP_RESHARDABLE, is_loading=False), str(folder))
    manifest = Manifest.of(folder, setting.run, 2, 1, DataIdentity("", ""), {}, optimizer=DP_RESHARDABLE)
    return Checkpoint(folder, manifest)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_training_goes_on_bit_for_bit(recipe: str, groups: Groups, tmp_path: Path) -> None:
    """Delayed scaling's factors travel in the checkpoint."""
    setting, packs = Setting(recipe=recipe), [PACK]
    batches = [batch_of(packs[0], setting, groups)]
    first = trainee_of(setting, groups)
    losses(first, packs, batches, 3, groups)
    checkpoint = saved(first, setting, tmp_path / "checkpoint")
    second = trainee_of(setting, groups, seed=2)
    load(checkpoint, TrainingState(second.chunks, second.optimizer, second.scheduler, ()))
    if recipe == "delayed":
        a, b = (linears(trainee.stages[0], "gen", 1)[2].fp8_meta for trainee in (first, second))
        for direction in ("scaling_fwd", "scaling_bwd"):
            assert torch.equal(a[direction].scale, b[direction].scale)
            assert torch.equal(a[direction].amax_history, b[direction].amax_history)
        assert a["scaling_fwd"].amax_history.any()
    assert losses(second, packs, batches, 2, groups) == losses(first, packs, batches, 2, groups)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_passes_without_gradients_leave_no_trace(recipe: str, groups: Groups) -> None:
    """Validation between steps, of another pack; it computes in bf16."""
    setting, packs = Setting(recipe=recipe), [PACK]
    batches, others = [batch_of(PACK, setting, groups)], [batch_of(TEXT, setting, groups)]
    undisturbed = losses(trainee_of(setting, groups), packs, batches, 4, groups)
    trainee = trainee_of(setting, groups)
    found = losses(trainee, packs, batches, 2, groups)
    with trainee.at_rest(averaged=False):
        without_gradients(trainee, others, LossCounts.of([TEXT]), RunConfig().objective, groups, broken=0)
        assert not any(linear.fp8 for linear in linears(trainee.stages[0], "und", 0))
    assert found + losses(trainee, packs, batches, 2, groups) == undisturbed


@pytest.mark.parametrize("to_engine", [True, False])
def test_checkpoints_of_one_spec_load_in_the_other(to_engine: bool, groups: Groups, tmp_path: Path) -> None:
    settings = [Setting(recipe="delayed"), Setting(engine=False)]
    theirs, own = reversed(settings) if to_engine else settings
    packs = [PACK]
    first, second = trainee_of(theirs, groups), trainee_of(own, groups, seed=2)
    losses(first, packs, [batch_of(packs[0], theirs, groups)], 2, groups)
    load(
        saved(first, theirs, tmp_path / "checkpoint"),
        TrainingState(second.chunks, second.optimizer, second.scheduler, ()),
    )
    pairs = zip(first.stages[0].parameters(), second.stages[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(loss > 0 for loss in losses(second, packs, [batch_of(packs[0], own, groups)], 2, groups))


# ---- the host


@pytest.mark.parametrize(
    "setting",
    [
        *(Setting(recipe=recipe, recompute=again) for recipe in ("none", *ON_HOPPER) for again in (None, "full")),
        *(Setting(attention=backend) for backend in ("varlen_te", "varlen_torch", "flex")),
        *(Setting(recipe=recipe, offload=2) for recipe in ("none", "tensorwise")),
    ],
    ids=lambda setting: f"{setting.recipe}-{setting.recompute}-{setting.attention}-{setting.offload}",
)
def test_the_host_waits_for_nothing_in_forward_and_backward(
    setting: Setting, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch raises at every call that would wait; the first step, which allocates and compiles, may."""
    skip_unless_served(setting.recipe)
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    packs = [PACK, TEXT]
    trainee, counts, objective = trainee_of(setting, groups), LossCounts.of(packs), RunConfig().objective
    batches = [batch_of(pack, setting, groups) for pack in packs]
    train_step(trainee, batches, counts, objective, groups, broken=0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(trainee, batches, counts, objective, groups, broken=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copies_of_a_batch_are_not_waited_for(groups: Groups) -> None:
    setting = Setting()
    batch = batch_of(PACK, setting, replace(groups, device=torch.device("cpu")))
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = batch.to(groups.device, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.positions.cpu(), batch.positions)
    assert torch.equal(moved.noisy_latents.cpu(), batch.noisy_latents)


@pytest.mark.parametrize("chunk_rows", [7, 100])
def test_the_heads_cross_entropy_is_that_of_whole_logits(chunk_rows: int, groups: Groups) -> None:
    generator = torch.Generator(groups.device).manual_seed(1)
    values = (torch.randn(n, 64, generator=generator, device=groups.device) for n in (50, 300))
    rows, weight = (x.bfloat16().requires_grad_() for x in values)
    labels = torch.randint(290, (50,), generator=generator, device=groups.device)
    want = nn.functional.cross_entropy(head_logits(rows, weight, 290).float(), labels, reduction="none")
    wanted = torch.autograd.grad(want.sum(), (rows, weight))
    got = head_cross_entropy(rows, weight, labels, 290, chunk_rows, groups.replica)
    found = torch.autograd.grad(got.sum(), (rows, weight))
    assert apart(got, want) < 1e-5 and all(apart(a, b) < 1e-2 for a, b in zip(found, wanted, strict=True))
