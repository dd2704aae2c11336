"""The public Lance key layout and this project's parameters (spec/model.md section 9).

Station: start of a run (weights by public key -> this rank's parameters).  One table says which public tensors make up
a parameter, how they are joined, and how the joined tensor is sharded over tensor-parallel ranks; loading a checkpoint,
random initialisation and the parity check all go through it.

Weight layout: Megatron's QKV is interleaved per key/value group [q..., k, v]; fc1 is [gate; up], each sharded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from megatron_lance.checkpoint.manifest import checkpoint_at, names_checkpoint
from megatron_lance.checkpoint.public_config import variants
from megatron_lance.checkpoint.public_files import Shape, TensorFolder, check_names
from megatron_lance.config.schema import ModelConfig
from megatron_lance.model.lance_model import LanceModel
from megatron_lance.packing.rng import stream

logger = logging.getLogger(__name__)

POSITION_KEY = "latent_pos_embed.pos_embed"
VIT_PREFIX = "vit_model."
IGNORED_KEYS = (POSITION_KEY, VIT_PREFIX)
"""Keys of public checkpoints that this model rebuilds or holds elsewhere."""
_OF_POSITIONS = ("rope_inv_freq_dtype", "rotary_base", "mape", "mape_step")
"""Settings that change what weights compute, but no shape."""


class WeightSource(Protocol):
    """Tensors by public key."""

    def get(self, key: str, shape: Shape) -> torch.Tensor:
        """The tensor of `key`, which has `shape`."""
        ...


@dataclass(frozen=True)
class Binding:
    """How public tensors become one parameter.

    Attributes:
        keys: public keys, in the order `join` takes them.
        shapes: their shapes.
        join: the public tensors -> the whole parameter.
        split: the inverse of join.
        shard_dim: dimension of the joined tensor that is sharded over tp ranks; None if replicated.
        parts: number of equal parts along shard_dim that are sharded each on its own (2 for [gate; up]).
    """

    keys: tuple[str, ...]
    shapes: tuple[Shape, ...]
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor]
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    shard_dim: int | None = None
    parts: int = 1

    @property
    def shape(self) -> Shape:
        """Of the joined tensor."""
        return tuple(self.join([torch.empty(shape, device="meta") for shape in self.shapes]).shape)

    def local(self, tensors: Sequence[torch.Tensor], tp_rank: int, tp: int) -> torch.Tensor:
        """This tp rank's shard of the joined tensors."""
        whole = self.join(tensors)
        if self.shard_dim is None or tp == 1:
            return whole
        pieces = [part.chunk(tp, self.shard_dim)[tp_rank] for part in whole.chunk(self.parts, self.shard_dim)]
        return torch.cat(pieces, self.shard_dim)

    def public(self, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The public tensors of the shards of all tp ranks; the inverse of `local`."""
        whole = shards[0]
        if self.shard_dim is not None:
            parts = [shard.chunk(self.parts, self.shard_dim) for shard in shards]
            whole = torch.cat([piece for part in zip(*parts, strict=True) for piece in part], self.shard_dim)
        return dict(zip(self.keys, self.split(whole), strict=True))


def _single(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(tensors))


def _alone(whole: torch.Tensor) -> Sequence[torch.Tensor]:
    return (whole,)


def _halves(whole: torch.Tensor) -> Sequence[torch.Tensor]:
    return whole.chunk(2)


def _interleave_qkv(groups: int) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """Q, k, v [heads * d, ...] -> per key/value group [q..., k, v]."""

    def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        per_group = [t.reshape(groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(per_group, dim=1).reshape(-1, *tensors[0].shape[1:])

    return join


def _separate_qkv(groups: int, q: int, kv: int) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """Per key/value group [q..., k, v] -> q [q rows, ...], k and v [kv rows, ...]."""

    def split(whole: torch.Tensor) -> Sequence[torch.Tensor]:
        per_group = whole.reshape(groups, -1, *whole.shape[1:])
        parts = per_group.split([q // groups, kv // groups, kv // groups], dim=1)
        return [part.reshape(-1, *whole.shape[1:]) for part in parts]

    return split


def single(key: str, *shape: int, shard_dim: int | None = None) -> Binding:
    """A parameter that is one public tensor."""
    return Binding((key,), (shape,), _single, _alone, shard_dim)


def _layer_bindings(model: ModelConfig, layer: int, suffix: str) -> dict[str, Binding]:
    """One expert of one layer; `suffix` is "" or "_moe_gen"."""
    h, d, ffn = model.hidden_size, model.kv_channels, model.ffn_hidden_size
    q, kv = model.num_attention_heads * d, model.num_query_groups * d
    public = f"language_model.model.layers.{layer}."
    attention = public + "self_attn."
    qkv = tuple(f"{attention}{x}_proj{suffix}" for x in "qkv")
    interleave, separate = _interleave_qkv(model.num_query_groups), _separate_qkv(model.num_query_groups, q, kv)
    mlp = f"{public}mlp{suffix}."

    table = {
        "input_layernorm.weight": single(f"{public}input_layernorm{suffix}.weight", h),
        "pre_mlp_layernorm.weight": single(f"{public}post_attention_layernorm{suffix}.weight", h),
        "self_attention.linear_qkv.weight": Binding(
            tuple(f"{k}.weight" for k in qkv), ((q, h), (kv, h), (kv, h)), interleave, separate, 0
        ),
        "self_attention.linear_qkv.bias": Binding(
            tuple(f"{k}.bias" for k in qkv), ((q,), (kv,), (kv,)), interleave, separate, 0
        ),
        "self_attention.linear_proj.weight": single(f"{attention}o_proj{suffix}.weight", h, q, shard_dim=1),
        "mlp.linear_fc1.weight": Binding(
            (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), ((ffn, h), (ffn, h)), _stack, _halves, 0, parts=2
        ),
        "mlp.linear_fc2.weight": single(f"{mlp}down_proj.weight", h, ffn, shard_dim=1),
    }
    for x in "qk" if model.qk_norm else "":
        table[f"self_attention.{x}_layernorm.weight"] = single(f"{attention}{x}_norm{suffix}.weight", d)
    return table


def bindings(model: ModelConfig) -> dict[str, Binding]:
    """Every parameter of the whole model by its global name (layers counted from 0 over all stages)."""
    h, c, v = model.hidden_size, model.latent_channels, model.vocab_size
    table = {
        "embedder.word_embeddings.weight": single("language_model.model.embed_tokens.weight", v, h, shard_dim=0),
        "heads.lm_head.weight": single("language_model.lm_head.weight", v, h, shard_dim=0),
        "heads.und_norm.weight": single("language_model.model.norm.weight", h),
        "heads.gen_norm.weight": single("language_model.model.norm_moe_gen.weight", h),
    }
    linears = (
        ("embedder.vae2llm", "vae2llm", (h, c)),
        ("heads.llm2vae", "llm2vae", (c, h)),
        ("embedder.time_embedder.mlp.0", "time_embedder.mlp.0", (h, 256)),
        ("embedder.time_embedder.mlp.2", "time_embedder.mlp.2", (h, h)),
    )
    for name, key, shape in linears:
        table[f"{name}.weight"] = single(f"{key}.weight", *shape)
        table[f"{name}.bias"] = single(f"{key}.bias", shape[0])
    for layer in range(model.num_layers):
        for expert, suffix in (("und", ""), ("gen", "_moe_gen")):
            for name, binding in _layer_bindings(model, layer, suffix).items():
                table[f"decoder.layers.{layer}.{expert}.{name}"] = binding
    return table


def public_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every public key and its shape."""
    return {key: shape for b in bindings(model).values() for key, shape in zip(b.keys, b.shapes, strict=True)}


def global_parameters(stages: Sequence[LanceModel]) -> Iterator[tuple[str, nn.Parameter]]:
    """This rank's parameters by their global names.

    Args:
        stages: the LanceModel chunks of this pipeline rank.
    """
    for stage in stages:
        layers = stage.decoder.layers
        for name, parameter in stage.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(layers[int(parts[2])].layer_number - 1)
            yield ".".join(parts), parameter


@torch.no_grad()
def load_weights(
    stages: Sequence[LanceModel], source: WeightSource, model: ModelConfig, *, tp_rank: int, tp: int
) -> None:
    """Fill every parameter of this rank from public tensors.

    Args:
        stages: the LanceModel chunks of this pipeline rank.
        source: tensors by public key.
        model: sizes.
        tp_rank: this rank's place among the tensor-parallel ranks.
        tp: tensor-parallel ranks.
    """
    table = bindings(model)
    for name, parameter in global_parameters(stages):
        binding = table[name]
        tensors = [source.get(key, shape) for key, shape in zip(binding.keys, binding.shapes, strict=True)]
        parameter.copy_(binding.local(tensors, tp_rank, tp))


@torch.no_grad()
def gather_public(
    tensors: Iterator[tuple[str, torch.Tensor]], model: ModelConfig, tp_group: dist.ProcessGroup
) -> Iterator[tuple[str, torch.Tensor]]:
    """Public tensors of this pipeline rank from parameter-shaped tensors; all tp ranks call this alike.

    Args:
        tensors: (global parameter name, this rank's shard of the weight or its gradient).
        model: sizes.
        tp_group: the tensor-parallel ranks, which hold the shards.

    Yields:
        (public key, whole tensor), on every tp rank.
    """
    table = bindings(model)
    for name, shard in tensors:
        binding = table[name]
        shards = [shard]
        if binding.shard_dim is not None and tp_group.size() > 1:
            shards = [torch.empty_like(shard) for _ in range(tp_group.size())]
            dist.all_gather(shards, shard.contiguous(), group=tp_group)
        yield from binding.public(shards).items()


class TensorSource:
    """Weights held in memory.

    Args:
        tensors: by public key.
        model: sizes the tensors must have.

    Raises:
        CheckpointError: listing missing, unknown and misshapen tensors together.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], model: ModelConfig) -> None:
        check_shapes({key: tuple(t.shape) for key, t in tensors.items()}, model, "the given weights")
        self.tensors = tensors

    def get(self, key: str, shape: Shape) -> torch.Tensor:
        """The tensor of `key`."""
        return self.tensors[key]


class FolderSource:
    """Weights in the safetensors files of a folder, read tensor by tensor.

    Args:
        folder: holds one or several *.safetensors files with public keys.
        model: sizes the tensors must have.
        name: what an error calls the folder.

    Raises:
        CheckpointError: if there is no such file, or tensors are missing, unknown or misshapen.
    """

    def __init__(self, folder: str | Path, model: ModelConfig, name: str = "") -> None:
        self.files = TensorFolder(folder, name)
        check_shapes({key: spec.shape for key, spec in self.files.specs.items()}, model, str(folder))

    def get(self, key: str, shape: Shape) -> torch.Tensor:
        """The tensor of `key`."""
        return self.files.get(key)


def with_rope_of(model: ModelConfig, folder: str | Path) -> ModelConfig:
    """The model with `rope_inv_freq_dtype` decided where the configuration leaves it open (spec/model.md section 4).

    Weights exported by this project name theirs in llm_config.json; released weights name none and were trained with
    bfloat16; new weights get float32.  Where the configuration decides otherwise than the weights say, a warning does.

    Args:
        model: sizes and variants.
        folder: where weights come from, in the public layout or a checkpoint; empty for new weights.

    Raises:
        UserError: if what the folder says of itself cannot be read.
    """
    named: Mapping[str, Any] = {}
    if str(folder):
        is_checkpoint = names_checkpoint(Path(folder))
        named = checkpoint_at(Path(folder)).manifest.config["model"] if is_checkpoint else variants(Path(folder))
    for name in _OF_POSITIONS:
        own, theirs = getattr(model, name), named.get(name)
        if None not in (own, theirs) and own != theirs:
            logger.warning("model.%s is %s, but the weights of %s were trained with %s", name, own, folder, theirs)
    if model.rope_inv_freq_dtype is not None:
        return model
    if not str(folder):
        return replace(model, rope_inv_freq_dtype="float32")
    dtype = named.get("rope_inv_freq_dtype", "bfloat16")
    logger.info("model.rope_inv_freq_dtype is %s, as the weights of %s were trained with", dtype, folder)
    return replace(model, rope_inv_freq_dtype=dtype)


def check_shapes(found: Mapping[str, Shape], model: ModelConfig, where: str) -> None:
    """Compare public keys and shapes with what the model needs.

    Raises:
        CheckpointError: counting missing, unknown and misshapen tensors together and naming the first of each.
    """
    held = {key: shape for key, shape in found.items() if not key.startswith(IGNORED_KEYS)}
    check_names(public_shapes(model), held, where)


class RandomSource:
    """Initial weights as functions of (seed, public key): the same for every layout.

    Norm weights are 1, attention biases 0, connectors and the time embedder as torch initialises linears, all other
    matrices normal with standard deviation 0.02.

    Args:
        seed: the run's seed.
    """

    CONNECTORS = ("vae2llm.", "llm2vae.", "time_embedder.")

    def __init__(self, seed: int, model: ModelConfig) -> None:
        self.seed = seed
        matrices = {key: shape for key, shape in public_shapes(model).items() if len(shape) > 1}
        self.fan_in = {key.rsplit(".", 1)[0]: shape[-1] for key, shape in matrices.items()}

    def get(self, key: str, shape: Shape) -> torch.Tensor:
        """The initial tensor of `key`, float32 `shape`."""
        module = key.rsplit(".", 1)[0]
        if module.endswith("norm") or module.endswith("norm_moe_gen"):
            return torch.ones(shape)
        rng = stream(self.seed, "weight", key)
        if key.startswith(self.CONNECTORS):
            bound = 1 / math.sqrt(self.fan_in[module])
            return torch.from_numpy(rng.uniform(-bound, bound, shape)).float()
        if key.endswith(".bias"):
            return torch.zeros(shape)
        return torch.from_numpy(rng.standard_normal(shape, dtype="float32")) * 0.02
