"""The dual-expert model in one process: Megatron's classes and no others, padding, hooks, precision, recompute."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from megatron_lance.checkpoint.hf_lance import bindings
from megatron_lance.config.schema import ParallelConfig
from megatron_lance.model.dual_expert_layer import DualExpertLayer
from megatron_lance.model.embedder import LatentPosition, TimeEmbedder, sincos_axis
from megatron_lance.model.heads import HeadOutputs
from megatron_lance.model.lance_model import LanceModel
from megatron_lance.model.layer_specs import HeadNorm, RMSNorm
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.packing.layout import PADDING
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Expert, Segment, SegmentKind
from megatron_lance.parallel.dispatch import RankBatch
from tests.shared import REPOSITORY
from tests.unit.tiny_model import (
    TINY,
    TOKENIZER_SIZE,
    Values,
    batch_of,
    build,
    forward_backward,
    mixed_pack,
    one_rank,
    pack_of,
    values_of,
    with_model,
)

PACKAGE = REPOSITORY / "megatron_lance"


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def model() -> LanceModel:
    return build()


def hidden_states(model: LanceModel, batch: RankBatch) -> list[torch.Tensor]:
    """Hidden states [s, h] behind the embedder and behind each layer, with gradients kept."""
    assert model.embedder is not None
    kept: list[torch.Tensor] = []

    def keep(hidden: torch.Tensor) -> None:
        hidden.retain_grad()
        kept.append(hidden)

    handles = [model.embedder.register_forward_hook(lambda _m, _i, out: keep(out))]
    handles += [layer.register_forward_hook(lambda _m, _i, out: keep(out[0])) for layer in model.decoder.layers]
    outputs = model(batch)
    for handle in handles:
        handle.remove()
    loss = (outputs.ce * batch.ce_weights).sum()
    loss = loss + ((outputs.velocity - batch.target).square().mean(-1) * batch.velocity_weights).sum()
    model.zero_grad(set_to_none=True)
    loss.backward()
    return kept


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


# ---- whose classes


def test_layers_are_megatrons_own(model: LanceModel) -> None:
    assert type(model.decoder) is TransformerBlock
    assert len(model.decoder.layers) == TINY.num_layers
    for layer in model.decoder.layers:
        assert type(layer) is DualExpertLayer
        for expert in (layer.und, layer.gen):
            assert type(expert) is TransformerLayer
            assert type(expert.self_attention) is SelfAttention
            assert type(expert.mlp) is MLP
            assert type(expert.self_attention.linear_qkv) is ColumnParallelLinear
            assert type(expert.self_attention.linear_proj) is RowParallelLinear
            assert type(expert.mlp.linear_fc1) is ColumnParallelLinear
            assert type(expert.mlp.linear_fc2) is RowParallelLinear
        assert layer.und is not layer.gen


def test_every_parameter_of_a_layer_belongs_to_an_expert(model: LanceModel) -> None:
    """Matrices are held by Megatron's parallel linears; what else there is, is a norm weight."""
    for layer in model.decoder.layers:
        owners = {module: name for name, module in layer.named_modules()}
        for module, name in owners.items():
            own = list(module.parameters(recurse=False))
            if own:
                assert name.startswith(("und.", "gen.")), name
                assert type(module) in (ColumnParallelLinear, RowParallelLinear, RMSNorm, HeadNorm), name
                assert type(module) not in (RMSNorm, HeadNorm) or [p.dim() for p in own] == [1]
        assert sum(type(m) in (ColumnParallelLinear, RowParallelLinear) for m in owners) == 8


def test_every_weight_is_used_through_its_modules_forward(model: LanceModel) -> None:
    """Overlapped parameter gathers wait in the forward pre-hook of the module that owns the weight."""
    owners = {m: name for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in owners]
    pack = mixed_pack()
    forward_backward(model, pack, batch_of(pack, values_of(pack))[1])
    for hook in hooks:
        hook.remove()
    assert {name for m, name in owners.items() if m not in called} == set()


def test_experts_share_nothing(model: LanceModel) -> None:
    parameters = list(model.parameters())
    assert len({p.data_ptr() for p in parameters}) == len(parameters)
    assert {name for name, _ in model.named_parameters()} == set(bindings(TINY))


def test_sharded_parameters_are_marked_for_the_gradient_norm(model: LanceModel) -> None:
    """Megatron counts unmarked parameters on one tensor-parallel rank only."""
    table = bindings(TINY)
    for name, parameter in model.named_parameters():
        marked = bool(getattr(parameter, "tensor_model_parallel", False))
        assert marked == (table[name].shard_dim is not None), name


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))


def second_implementations(file: str, tree: ast.Module) -> list[str]:
    """Traces of a transformer layer that is not Megatron's."""
    found = []
    allowed = {
        "Linear": {"model/embedder.py"},
        "ColumnParallelLinear": {"model/heads.py"},
        "VocabParallelEmbedding": {"model/embedder.py"},
        "scaled_dot_product_attention": {"ops/rectangle.py"},
        "rms_norm": {"model/layer_specs.py", "ops/qk_norm_mape.py"},
    }
    banned = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "RowParallelLinear", "Conv1d")
    for name, call in calls(tree):
        last = name.rsplit(".", 1)[-1]
        if last in banned or (last in allowed and file not in allowed[last]):
            found.append(f"{file}:{call.lineno} {name}")
        if name in ("F.linear", "torch.nn.functional.linear", "torch.addmm") or (
            file.startswith("model/") and last in ("matmul", "einsum", "bmm", "softmax")
        ):
            found.append(f"{file}:{call.lineno} {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases}
            taken = bases & {"TransformerLayer", "SelfAttention", "MLP", "TransformerBlock", "ColumnParallelLinear"}
            if file == "model/heads.py":  # the LM head's weight is Megatron's, what is made of it is cross-entropy
                taken -= {"ColumnParallelLinear"}
            found += [f"{file}:{node.lineno} class {node.name}({base})" for base in taken]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and file.startswith("model/"):
            found.append(f"{file}:{node.lineno} @")
    return found


def test_no_second_implementation_of_a_layer() -> None:
    assert [trace for file, tree in trees() for trace in second_implementations(file, tree)] == []


def test_small_linears_are_made_in_one_place() -> None:
    tree = dict(trees())["model/embedder.py"]
    makers = {
        function.name: [name for name, _ in calls(function) if name.endswith("nn.Linear")]
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
    }
    assert {name: made for name, made in makers.items() if made} == {"replicated_linear": ["nn.Linear"]}


@pytest.mark.parametrize(
    "source",
    [
        "self.attention = nn.MultiheadAttention(8, 2)",
        "self.q_proj = nn.Linear(8, 8)",
        "self.proj = RowParallelLinear(8, 8)",
        "class FastLayer(TransformerLayer): ...",
        "y = F.linear(x, w)",
        "y = x @ w",
    ],
)
def test_a_second_implementation_is_found(source: str) -> None:
    assert len(second_implementations("model/other.py", ast.parse(source))) == 1


def test_replicated_linears_and_norms_follow_sequence_parallelism() -> None:
    """On sequence-sharded rows their gradients must be summed over tensor-parallel ranks."""
    for tp in (1, 2):
        config = transformer_config(TINY, ParallelConfig(tensor_model_parallel_size=tp), "float32")
        assert config.sequence_parallel == (tp > 1)
        for module in (RMSNorm(config, 8, 1e-6), TimeEmbedder(config)):
            assert all(getattr(p, "sequence_parallel", None) == (tp > 1) for p in module.parameters())


# ---- padding


@pytest.mark.parametrize("alignment", [1, 16])
def test_padding_rows_stay_zero_and_receive_no_gradient(model: LanceModel, alignment: int) -> None:
    pack = mixed_pack()
    layout, batch = batch_of(pack, values_of(pack), alignment)
    padding = torch.from_numpy(layout.tokens[0] == PADDING)
    assert padding[: layout.und_rows].any() or alignment == 1
    assert padding[layout.und_rows :].any()
    for hidden in hidden_states(model, batch):
        assert not hidden[padding].any() and hidden[~padding].any(dim=-1).all()
        assert hidden.grad is not None
        assert not hidden.grad[padding].any() and torch.isfinite(hidden.grad).all()


def test_the_amount_of_padding_changes_nothing(model: LanceModel) -> None:
    pack = mixed_pack()
    values = values_of(pack)
    tight, wide = (forward_backward(model, pack, batch_of(pack, values, alignment)[1]) for alignment in (1, 32))
    torch.testing.assert_close(tight.loss, wide.loss, rtol=1e-6, atol=0)
    for name, gradient in tight.gradients.items():
        torch.testing.assert_close(gradient, wide.gradients[name], rtol=1e-4, atol=1e-6)


# ---- every parameter takes part in every batch

SCARCE = {
    "text only, labelled": (Sample("s", Task.T2T, (Segment.text(6),), ((2, 4),)),),
    "no loss at all": (Sample("s", Task.T2T, (Segment.text(6),)),),
    "generation without labels": (
        Sample("s", Task.T2I, (Segment.text(3), Segment.visual(SegmentKind.NOISE, (1, 2, 2)))),
    ),
    "understanding without generation": (
        Sample("s", Task.I2T, (Segment.visual(SegmentKind.VIT, (1, 2, 2)), Segment.text(4)), ((7, 9),)),
    ),
    "all frames are conditions": (Sample("s", Task.I2V, (Segment.visual(SegmentKind.NOISE, (2, 1, 1), (0, 1)),)),),
    "one token": (Sample("s", Task.T2T, (Segment.text(1),)),),
}


@pytest.mark.parametrize("samples", SCARCE.values(), ids=SCARCE.keys())
def test_every_parameter_gets_a_gradient_whatever_the_batch_lacks(
    model: LanceModel, samples: tuple[Sample, ...]
) -> None:
    """Megatron's overlapped reduction counts gradient hooks: none may be missing."""
    pack = pack_of(*samples)
    result = forward_backward(model, pack, batch_of(pack, values_of(pack))[1])
    assert torch.isfinite(result.loss)
    for name, gradient in result.gradients.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
    if not pack.ce_rows and not pack.velocity_rows:
        assert result.loss == 0 and not any(g.any() for g in result.gradients.values() if g is not None)


def test_an_invalid_sample_has_no_gradient(model: LanceModel) -> None:
    """A pack whose one visual could not be read trains as if the sample had no loss rows."""
    pack = pack_of(Sample("s", Task.T2I, (Segment.text(3), Segment.visual(SegmentKind.NOISE, (1, 2, 2)))))
    tokens, visuals, noise = values_of(pack)
    broken = replace(visuals, latents=visuals.latents * 0, valid=torch.zeros(1, dtype=torch.bool))
    result = forward_backward(model, pack, batch_of(pack, (tokens, broken, noise))[1])
    assert result.loss == 0 and not any(g.any() for g in result.gradients.values() if g is not None)


# ---- what may influence what


def outputs_of(model: LanceModel, pack: Pack, values: Values) -> dict[str, torch.Tensor]:
    """CE by row and velocity by gen token."""
    layout, batch = batch_of(pack, values)
    with torch.no_grad():
        out = model(batch)
    assert isinstance(out, HeadOutputs)
    gen = layout.region_tokens(Expert.GEN, 0)
    velocity = torch.full((pack.length, TINY.latent_channels), math.nan)
    velocity[gen[gen != PADDING]] = out.velocity[torch.from_numpy(gen != PADDING)]
    return {"ce": out.ce, "velocity": velocity}


def test_samples_of_a_pack_do_not_see_one_another(model: LanceModel) -> None:
    """Each sample alone gives what it gives in the pack."""
    pack = mixed_pack()
    tokens, visuals, noise = values_of(pack)
    whole, ce_at, vit_at, vae_at = outputs_of(model, pack, (tokens, visuals, noise)), 0, 0, 0
    for start, sample in zip(pack.sample_starts, pack.samples, strict=True):
        vit = sum(s.content_length for s in sample.segments if s.kind is SegmentKind.VIT)
        vae = slice(vae_at, vae_at + sample.gen_length)
        alone = pack_of(sample)
        own_tokens = type(tokens).from_ids(alone, tokens.token_ids[start : start + sample.length])
        valid = torch.ones(sum(s.is_visual for s in sample.segments), dtype=torch.bool)
        own_visuals = type(visuals)(visuals.vit[vit_at : vit_at + vit], visuals.latents[vae], valid)
        own_noise = type(noise)(noise.timesteps[vae], noise.noise[vae], noise.loss_rows[vae])
        got = outputs_of(model, alone, (own_tokens, own_visuals, own_noise))
        want = whole["velocity"][start : start + sample.length]
        torch.testing.assert_close(got["velocity"], want, rtol=1e-5, atol=1e-6, equal_nan=True)
        if sample.ce_rows:
            torch.testing.assert_close(got["ce"], whole["ce"][ce_at : ce_at + sample.ce_rows], rtol=1e-5, atol=1e-6)
        ce_at, vit_at, vae_at = ce_at + sample.ce_rows, vit_at + vit, vae.stop


def test_noise_is_seen_by_its_own_block_only(model: LanceModel) -> None:
    """Two noise blocks after one clean context: changing the first changes neither the second nor the text."""
    block = Segment.visual(SegmentKind.NOISE, (1, 1, 2))
    segments = (Segment.text(2), block, block, Segment.text(4))
    pack = pack_of(Sample("s", Task.T2T, segments, ((11, 14),)))
    tokens, visuals, noise = values_of(pack)
    changed = noise.noise.clone()
    changed[:2] += 1
    before = outputs_of(model, pack, (tokens, visuals, noise))
    after = outputs_of(model, pack, (tokens, visuals, replace(noise, noise=changed)))
    assert torch.equal(before["ce"], after["ce"])
    assert torch.equal(before["velocity"][7:9], after["velocity"][7:9])
    assert not torch.isclose(before["velocity"][3:5], after["velocity"][3:5]).any()


def test_every_layer_meets_in_joint_attention(model: LanceModel) -> None:
    """A generation row depends on the text before it, an answer on the image before it."""
    pack = mixed_pack()
    tokens, visuals, noise = values_of(pack)
    before = outputs_of(model, pack, (tokens, visuals, noise))
    ids = tokens.token_ids.clone()
    edit, video = pack.sample_starts[1], pack.sample_starts[2]
    ids[edit] = (ids[edit] + 1) % TOKENIZER_SIZE
    after = outputs_of(model, pack, (replace(tokens, token_ids=ids), visuals, noise))
    assert not torch.allclose(before["velocity"][edit:video], after["velocity"][edit:video], equal_nan=True)
    other = outputs_of(model, pack, (tokens, replace(visuals, vit=visuals.vit + 1), noise))
    assert not torch.isclose(before["ce"][:3], other["ce"][:3]).any()
    assert torch.equal(before["ce"][3:], other["ce"][3:])


def test_only_position_differences_matter(model: LanceModel) -> None:
    """Queries and keys are rotated alike: a common offset changes nothing, another order of positions does."""
    pack = mixed_pack()
    _, batch = batch_of(pack, values_of(pack))
    with torch.no_grad():
        plain, moved, swapped = (
            model(replace(batch, positions=positions)).velocity
            for positions in (batch.positions, batch.positions + 40, batch.positions.flip(0))
        )
    torch.testing.assert_close(moved, plain, rtol=1e-3, atol=1e-4)
    assert relative(swapped, plain) > 1e-2


# ---- heads


def test_logits_are_logits_and_ce_is_theirs(model: LanceModel) -> None:
    pack = mixed_pack()
    _, batch = batch_of(pack, values_of(pack))
    with torch.no_grad():
        outputs = model(batch)
    assert torch.isneginf(outputs.logits[:, TOKENIZER_SIZE:]).all()
    used = outputs.logits[:, :TOKENIZER_SIZE]
    assert torch.isfinite(used).all() and (used < 0).any()
    want = nn.functional.cross_entropy(used, batch.ce_labels, reduction="none")
    torch.testing.assert_close(outputs.ce, want, rtol=1e-5, atol=1e-6)


def test_rows_of_the_lm_head_beyond_the_tokenizer_get_no_gradient(model: LanceModel) -> None:
    pack = mixed_pack()
    gradients = forward_backward(model, pack, batch_of(pack, values_of(pack))[1]).gradients
    head = gradients["heads.lm_head.weight"]
    assert head is not None and head[:TOKENIZER_SIZE].any() and not head[TOKENIZER_SIZE:].any()


# ---- precision, recompute, backends


def test_bf16_is_near_float32() -> None:
    pack = mixed_pack()
    _, batch = batch_of(pack, values_of(pack))
    exact = forward_backward(build(), pack, batch)
    half_model = build(precision="bf16")
    assert {p.dtype for p in half_model.parameters()} == {torch.bfloat16}
    half = forward_backward(half_model, pack, batch.to(torch.device("cpu"), torch.bfloat16))
    assert half.outputs.velocity.dtype == torch.bfloat16 and half.outputs.ce.dtype == torch.float32
    assert 0 < relative(half.loss, exact.loss) < 0.02
    held = batch.gen_mask[:, 0]
    assert relative(half.outputs.velocity[held], exact.outputs.velocity[held]) < 0.05
    for name, gradient in half.gradients.items():
        want = exact.gradients[name]
        assert gradient is not None and want is not None and gradient.dtype == torch.bfloat16
        assert relative(gradient, want) < 0.15, name


RECOMPUTE: list[tuple[str, tuple[str, ...]]] = [
    ("full", ()),
    ("selective", ("core_attn",)),
    ("selective", ("layernorm",)),
    ("selective", ("mlp",)),
    ("selective", ("core_attn", "layernorm", "mlp")),
]


@pytest.mark.parametrize(("granularity", "modules"), RECOMPUTE)
@pytest.mark.parametrize("samples", [None, SCARCE["text only, labelled"]], ids=["mixed", "text only"])
def test_recompute_gives_the_same_gradients(
    samples: tuple[Sample, ...] | None, granularity: str, modules: tuple[str, ...]
) -> None:
    """The same bits; with norms recomputed the three terms of a row's gradient are added in another order."""
    pack = pack_of(*samples) if samples else mixed_pack()
    _, batch = batch_of(pack, values_of(pack))
    plain = forward_backward(build(), pack, batch)
    again = forward_backward(build(recompute=granularity, modules=modules), pack, batch)
    assert torch.equal(plain.loss, again.loss)
    for name, gradient in plain.gradients.items():
        other = again.gradients[name]
        assert gradient is not None and other is not None
        allowed = 1e-6 * gradient.abs().max() if "layernorm" in modules else 0.0
        assert (other - gradient).abs().max() <= allowed, name


def test_full_recompute_runs_the_layers_twice() -> None:
    pack = mixed_pack()
    _, batch = batch_of(pack, values_of(pack))
    for mode, runs in ((None, 1), ("full", 2)):
        model, seen = build(recompute=mode), list[int]()
        model.decoder.layers[1].register_forward_hook(lambda _m, _i, _o, seen=seen: seen.append(1))
        forward_backward(model, pack, batch)
        assert len(seen) == runs


def kept_bytes(granularity: str | None, modules: tuple[str, ...] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward."""
    pack = mixed_pack()
    model = build(recompute=granularity, modules=modules)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = model(batch_of(pack, values_of(pack))[1])
    assert outputs is not None
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_each_selective_recompute_keeps_less() -> None:
    everything = kept_bytes(None)
    for module in ("core_attn", "layernorm", "mlp"):
        assert kept_bytes("selective", (module,)) < everything, module
    assert kept_bytes("full") < kept_bytes("selective", ("core_attn", "layernorm", "mlp"))


@pytest.mark.parametrize("again", ["selective", "full"])
def test_backends_give_the_same_loss(again: str) -> None:
    pack = mixed_pack()
    _, batch = batch_of(pack, values_of(pack))
    a, *others = (
        forward_backward(build(with_model(attention_backend=name), recompute=recompute), pack, batch)
        for name, recompute in (("dense", None), ("sdpa", None), ("varlen_emulated", None), ("varlen_emulated", again))
    )
    for b in others:
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
        for name, gradient in a.gradients.items():
            torch.testing.assert_close(gradient, b.gradients[name], rtol=1e-4, atol=1e-6)


def test_two_runs_give_the_same_bits(model: LanceModel) -> None:
    pack = mixed_pack()
    _, batch = batch_of(pack, values_of(pack))
    first, second = forward_backward(model, pack, batch), forward_backward(model, pack, batch)
    for name, gradient in first.gradients.items():
        other = second.gradients[name]
        assert gradient is not None and other is not None and torch.equal(gradient, other), name


def test_rounded_frequencies_are_used_when_asked_for() -> None:
    pack = mixed_pack()
    values = values_of(pack)
    exact, rounded = (
        outputs_of(build(with_model(rope_inv_freq_dtype=d)), pack, values) for d in ("float32", "bfloat16")
    )
    assert not torch.equal(exact["ce"], rounded["ce"])


# ---- checkpoints


def sharded_keys(model: LanceModel, metadata: dict[str, bool] | None) -> dict[str, set[str]]:
    """Key in a distributed checkpoint -> the parameters it holds."""
    out: dict[str, set[str]] = {}
    for name, value in model.sharded_state_dict(prefix="", metadata=metadata).items():
        if not name.endswith("_extra_state"):
            out.setdefault(value.key, set()).add(name)
    return out


def test_sharded_state_dict_holds_every_parameter_by_layer_and_expert(model: LanceModel) -> None:
    names = {name for name, _ in model.named_parameters()}
    keys = sharded_keys(model, {"non_homogeneous_layers": True})
    assert keys == {name: {name} for name in names}
    assert {"decoder.layers.1.und.mlp.linear_fc2.weight", "decoder.layers.1.gen.mlp.linear_fc2.weight"} <= set(keys)


def test_sharded_state_dict_may_stack_layers_but_never_experts(model: LanceModel) -> None:
    """Megatron's default joins the layers under one key with a layer axis."""
    names = {name for name, _ in model.named_parameters()}
    keys = sharded_keys(model, None)
    assert set().union(*keys.values()) == names
    for key, held in keys.items():
        layers = range(TINY.num_layers) if key.startswith("decoder.") else [0]
        assert held == {key.replace("decoder.layers.", f"decoder.layers.{i}.") for i in layers}
    assert {
        "decoder.layers.und.self_attention.linear_qkv.weight",
        "decoder.layers.gen.self_attention.linear_qkv.weight",
    }.issubset(keys)


# ---- embedder


def test_latent_position_is_the_flat_table() -> None:
    """Row i*M*M + j*M + k of concatenated 1D tables, d_t = d_h = largest even <= h/3 (spec/model.md section 5)."""
    frames, m, hidden = 3, 4, 32
    third = 2 * (hidden // 6)

    def axis(position: int, dim: int) -> list[float]:
        angles = [position * 1e4 ** (-i / (dim / 2)) for i in range(dim // 2)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    flat = [
        axis(i, third) + axis(j, third) + axis(k, hidden - 2 * third)
        for i in range(frames)
        for j in range(m)
        for k in range(m)
    ]
    grid = torch.from_numpy(np.indices((frames, m, m)).reshape(3, -1).T.copy())
    got = LatentPosition(frames, m, hidden)(grid)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), np.array(flat, dtype=np.float64).astype(np.float32))


@pytest.mark.parametrize(("hidden", "dims"), [(2048, (682, 682, 684)), (64, (20, 20, 24))])
def test_latent_position_dimensions(hidden: int, dims: tuple[int, ...]) -> None:
    table = LatentPosition(1, 2, hidden)
    assert (table.t.shape[1], table.h.shape[1], table.w.shape[1]) == dims
    assert not list(table.parameters()) and not table.state_dict(), "frozen and rebuilt rather than saved"


def test_a_side_longer_than_the_table_continues_in_the_next_row() -> None:
    table = LatentPosition(3, 4, 32)
    over, under = torch.tensor([[0, 0, 5], [0, 5, 1], [1, 3, 4]]), torch.tensor([[0, 1, 1], [1, 1, 1], [2, 0, 0]])
    assert torch.equal(table(over), table(under))


def test_sincos_axis_starts_at_zero_and_one() -> None:
    first = sincos_axis(2, 6)[0]
    assert first.tolist() == [0, 0, 0, 1, 1, 1]


def test_time_embedding_features(model: LanceModel) -> None:
    """[cos, sin] of 128 frequencies of t as it is."""
    assert model.embedder is not None
    seen: list[torch.Tensor] = []
    handle = model.embedder.time_embedder.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model.embedder.time_embedder(torch.tensor([0.0, 0.75]))
    handle.remove()
    frequencies = [math.exp(-math.log(1e4) * i / 128) for i in range(128)]
    want = [[f(t * w) for f in (math.cos, math.sin) for w in frequencies] for t in (0.0, 0.75)]
    torch.testing.assert_close(seen[0], torch.tensor(want), rtol=1e-5, atol=1e-6)


def test_inputs_are_the_sums_of_section_2(model: LanceModel) -> None:
    """Text: word embedding.  ViT: as it is.  VAE: vae2llm(x_t) + time_embedder(t) + latent position."""
    pack = mixed_pack()
    tokens, visuals, noise = values = values_of(pack)
    layout, batch = batch_of(pack, values)
    embedder = model.embedder
    assert embedder is not None and isinstance(embedder.word_embeddings, VocabParallelEmbedding)
    with torch.no_grad():
        rows = embedder(batch).squeeze(1)
        got = {int(t): row for t, row in zip(layout.tokens[0], rows, strict=True) if t != PADDING}
        vit_at = vae_at = 0
        for placed in pack.placed_segments():
            start, stop = placed.content if placed.segment.is_visual else (placed.start, placed.start)
            for token in [t for t in range(placed.start, placed.stop) if not start <= t < stop]:
                assert torch.equal(got[token], embedder.word_embeddings.weight[tokens.token_ids[token]])
            for token, cell in zip(range(start, stop), np.ndindex(placed.segment.grid or (0,)), strict=True):
                if placed.segment.kind is SegmentKind.VIT:
                    want = visuals.vit[vit_at]
                    vit_at += 1
                else:
                    t = noise.timesteps[vae_at]
                    x_t = (1 - t) * visuals.latents[vae_at] + t * noise.noise[vae_at]
                    place = embedder.latent_position(torch.tensor([cell]))[0]
                    want = embedder.vae2llm(x_t) + embedder.time_embedder(t[None])[0] + place
                    vae_at += 1
                torch.testing.assert_close(got[token], want, rtol=1e-5, atol=1e-5)
