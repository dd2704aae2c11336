"""A dual-expert layer: two Megatron transformer layers that meet in one attention (design section 3).

Station: embedder -> [layers] -> heads.  Hidden states are [und shard | gen shard] rows; every linear sees the slice of
its expert, and only q, k, v are joined.

Shapes: s rows of this tp rank, b = 1, h hidden; R rows of the cp rank; np query heads and ng key/value heads of this
tp rank, hn head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, TransformerLayer

from megatron_lance.model.joint_attention import JointAttention, PackContext
from megatron_lance.ops.mape import rotate


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
        pg_collection: process groups.
        vp_stage: virtual pipeline stage.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DualExpertLayerSubmodules,
        layer_number: int,
        attention_backend: str,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        experts = (
            build_module(spec, config=config, layer_number=layer_number, pg_collection=pg_collection, vp_stage=vp_stage)
            for spec in (submodules.und, submodules.gen)
        )
        self.und, self.gen = experts
        self.layer_number: int = self.und.layer_number  # global, 1-based
        self.joint_attention = JointAttention(attention_backend, pg_collection.cp)

    def _qkv(self, expert: TransformerLayer, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One expert's normed projections of its region.

        [s_region / tp, 1, h] -> q [R_region, np, hn], k and v [R_region, ng, hn], QK-norm applied.
        """
        normed = expert.input_layernorm(rows)
        qkv = expert.self_attention.get_query_key_value_tensors(normed)
        return tuple(x.squeeze(1) for x in qkv)

    def _finish(self, expert: TransformerLayer, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Output projection, residual and MLP of one expert.

        attended [R_region, np, hn] and residual [s_region / tp, 1, h] -> [s_region / tp, 1, h].
        """
        # [R, np, hn] -> [R, 1, np * hn]
        projected = expert.self_attention.linear_proj(attended.reshape(attended.shape[0], 1, -1))
        add = expert.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        return expert._forward_mlp(add(projected, residual, expert.hidden_dropout))

    def forward(
        self, hidden_states: torch.Tensor, packed_seq_params: PackContext, **unused: object
    ) -> tuple[torch.Tensor, None]:
        """[s, 1, h] -> ([s, 1, h], None); the other arguments of a TransformerLayer are not used here."""
        context = packed_seq_params
        shards = hidden_states.split(list(context.shard_rows))
        experts = (self.und, self.gen)
        per_expert = [self._qkv(expert, rows) for expert, rows in zip(experts, shards, strict=True)]
        q, k, v = (torch.cat(pair) for pair in zip(*per_expert, strict=True))  # [R, heads, hn]
        q, k = (rotate(x, context.cos, context.sin) for x in (q, k))
        attended = self.joint_attention(q, k, v, context).split(list(context.region_rows))
        outputs = [self._finish(*args) for args in zip(experts, attended, shards, strict=True)]
        return torch.cat(outputs), None
