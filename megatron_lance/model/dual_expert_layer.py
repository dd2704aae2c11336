"""A dual-expert layer: two Megatron transformer layers that meet in one attention (design section 3).

Station: embedder -> [layers] -> heads.  Hidden states are [und shard | gen shard] rows; every linear sees the slice of
its expert, and only q, k, v are joined.

Shapes: s rows of this tp rank, b = 1, h hidden; R rows of the cp rank; np query heads and ng key/value heads of this
tp rank, hn head channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, TransformerLayer
from torch import nn
from torch.autograd.profiler import record_function

from megatron_lance.model.joint_attention import JointAttention, PackContext
from megatron_lance.model.transformer_config import DualExpertConfig
from megatron_lance.ops.qk_norm_mape import join, qk_norm_mape


@dataclass
class DualExpertLayerSubmodules:
    """The two experts' layer specs.

    Attributes:
        und: a TransformerLayer spec for text, ViT content and markers.
        gen: a TransformerLayer spec for VAE content.
    """

    und: ModuleSpec
    gen: ModuleSpec


class DualExpertLayer(MegatronModule, BaseTransformerLayer):
    """Two experts, one attention.

    Args:
        config: shared by both experts.
        submodules: their specs.
        layer_number: 1-based within the pipeline stage; both experts get it and add the stage's offset.
        attention_backend: of ops.attention.
        mape_backend: of ops.qk_norm_mape.
        mrope_section: frequencies per axis (temporal, height, width).
        without_fp8: a context in which linears compute in bf16, for regions too small for FP8; None: they compute as
            the others do.
        pg_collection: process groups.
        vp_stage: virtual pipeline stage.
    """

    def __init__(
        self,
        config: DualExpertConfig,
        submodules: DualExpertLayerSubmodules,
        layer_number: int,
        attention_backend: str,
        mape_backend: str,
        mrope_section: tuple[int, ...],
        without_fp8: Callable[[], AbstractContextManager[None]] | None,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        where = {"layer_number": layer_number, "pg_collection": pg_collection, "vp_stage": vp_stage}
        self.und, self.gen = (
            build_module(spec, config=_config_of(expert, config), **where)
            for expert, spec in (("und", submodules.und), ("gen", submodules.gen))
        )
        self.layer_number: int = self.und.layer_number  # global, 1-based
        self.position = layer_number
        recomputed = config.recompute_modules if config.recompute_granularity == "selective" else []
        self.joint_attention = JointAttention(attention_backend, pg_collection.cp, "core_attn" in recomputed)
        self.mape_backend, self.mrope_section = mape_backend, mrope_section
        self.without_fp8, self.tp_group = without_fp8, pg_collection.tp
        # Beyond the key/value heads, tp ranks share a group's QKV and each takes some of its query heads.
        tp, groups = pg_collection.tp.size(), config.num_query_groups or config.num_attention_heads
        sharing = max(1, tp // groups)
        self.group_query_heads = config.num_attention_heads // groups // sharing
        self.query_offset = pg_collection.tp.rank() % sharing * self.group_query_heads
        self.query_heads = config.num_attention_heads // tp

    def _norm(
        self, norm: nn.Module, rows: torch.Tensor, recomputed: bool
    ) -> tuple[torch.Tensor, tensor_parallel.CheckpointWithoutOutput | None]:
        """A norm's output and, if it is recomputed, what drops that output until backward needs it."""
        if not recomputed:
            return norm(rows), None
        keep = tensor_parallel.CheckpointWithoutOutput(fp8=self.config.fp8)
        return keep.checkpoint(norm, rows), keep

    def _qkv(
        self,
        expert: TransformerLayer,
        rows: torch.Tensor,
        positions: torch.Tensor,
        inv_freq: torch.Tensor,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's projections of its region, QK-norm and rotation applied.

        [s_region / tp, 1, h] and positions [3, R_region] -> q [R_region, np, hn], in `out` if given, and k and v
        [R_region, 2, ng, hn].
        """
        normed, norm = self._norm(expert.input_layernorm, rows, expert.recompute_input_layernorm)
        attention = expert.self_attention
        # [R, 1, ng, (query heads of a group + 2) * hn]; query heads of other tp ranks may be among them
        qkv, _ = attention.get_query_key_value_tensors(normed, split_qkv=False)
        if norm:  # qkv's gradient is there before the projection's backward reads `normed`
            norm.discard_output_and_register_recompute(qkv)
        weights = [norm() if norm else None for norm in (attention.q_layernorm, attention.k_layernorm)]
        with record_function("part: mape"):  # a range for profiling/trace.py; not a module, so not marked from there
            return qk_norm_mape(
                qkv.squeeze(1),
                positions,
                inv_freq,
                *weights,
                sections=self.mrope_section,
                eps=self.config.layernorm_epsilon,
                backend=self.mape_backend,
                query_heads=self.group_query_heads,
                query_offset=self.query_offset,
                out=out,
            )

    def _query_buffers(self, like: torch.Tensor, region_rows: tuple[int, int]) -> list[torch.Tensor | None]:
        """Slices [R_region, np, hn] of one buffer for the queries of both regions, so that joining them is free."""
        if self.mape_backend == "reference":
            return [None, None]
        joint = like.new_empty(sum(region_rows), self.query_heads, self.config.kv_channels)
        return list(joint.split(list(region_rows)))

    def _finish(self, expert: TransformerLayer, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Output projection, residual and MLP of one expert.

        attended [R_region, np, hn] and residual [s_region / tp, 1, h] -> [s_region / tp, 1, h].
        """
        # [R, np, hn] -> [R, 1, np * hn]
        projected = expert.self_attention.linear_proj(attended.reshape(attended.shape[0], 1, -1))
        add = expert.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        return self._mlp(expert, add(projected, residual, expert.hidden_dropout))

    def _mlp(self, expert: TransformerLayer, rows: torch.Tensor) -> torch.Tensor:
        """Norm, MLP and residual of one expert: [s_region / tp, 1, h] -> the same shape."""
        normed, norm = self._norm(expert.pre_mlp_layernorm, rows, expert.recompute_pre_mlp_layernorm)
        output = self._recomputed(expert.mlp, normed) if expert.recompute_mlp else expert.mlp(normed)
        if norm:
            norm.discard_output_and_register_recompute(output[0])
        add = expert.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add(output, rows, expert.hidden_dropout)

    def _recomputed(self, module: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What an MLP returns, nothing of it kept; FP8's scaling factors are as they were when it is run again."""
        if not self.config.fp8:
            return tensor_parallel.checkpoint(module, False, rows)
        tracker = tensor_parallel.random.get_cuda_rng_tracker
        return te_checkpoint(module, False, tracker, self.tp_group, rows)

    def _precision(self, region: int, context: PackContext) -> AbstractContextManager[None]:
        """What an expert's linears compute in: what surrounds the layer, or bf16 for a region too small for FP8."""
        return self.without_fp8() if self.without_fp8 and context.small[region] else nullcontext()

    def forward(
        self, hidden_states: torch.Tensor, packed_seq_params: PackContext, **unused: object
    ) -> tuple[torch.Tensor, None]:
        """[s, 1, h] -> ([s, 1, h], None); the other arguments of a TransformerLayer are not used here."""
        context = packed_seq_params
        if context.offload is None:
            return self._rows(context, hidden_states), None
        stays = chain(self.parameters(), self.buffers(), context.tensors())
        return context.offload.layer(self.position, partial(self._rows, context), hidden_states, stays), None

    def _rows(self, context: PackContext, hidden_states: torch.Tensor) -> torch.Tensor:
        """[s, 1, h] -> [s, 1, h]."""
        shards = hidden_states.split(list(context.shard_rows))
        positions = context.positions.split(list(context.region_rows), dim=1)
        buffers = self._query_buffers(hidden_states, context.region_rows)
        exchange = self.joint_attention.exchange(context, self.layer_number)
        experts, queries, sent = (self.und, self.gen), [], []
        for region, (expert, rows) in enumerate(zip(experts, shards, strict=True)):
            with self._precision(region, context):
                q, kv = self._qkv(expert, rows, positions[region], context.inv_freq, buffers[region])
            sent.append(exchange.send(region, kv))  # und's is under way while gen projects
            queries.append(q)
        attended = self.joint_attention(join(queries), sent, exchange, context).split(list(context.region_rows))
        outputs = []
        for region, args in enumerate(zip(experts, attended, shards, strict=True)):
            with self._precision(region, context):
                outputs.append(self._finish(*args))
        return torch.cat(outputs)


def _config_of(expert: str, config: DualExpertConfig) -> DualExpertConfig:
    """What an expert is built with: without recompute of its modules if it is not among those that recompute."""
    if expert in config.recompute_experts:
        return config
    own = copy.copy(config)  # not `replace`, which would derive everything anew
    own.recompute_modules = [module for module in config.recompute_modules if module not in ("layernorm", "mlp")]
    return own
