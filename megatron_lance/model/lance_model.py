"""The model as one pipeline stage (or one virtual stage) of it.

Station: dispatch -> [embedder -> dual-expert layers -> heads] -> losses.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from torch import nn

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import ModelConfig
from megatron_lance.model.embedder import Embedder
from megatron_lance.model.heads import HeadOutputs, Heads
from megatron_lance.model.joint_attention import KeyValueCache, PackContext
from megatron_lance.model.layer_specs import block_submodules, device, parts_of
from megatron_lance.model.offload import ForwardPass, Offload
from megatron_lance.model.transformer_config import DualExpertConfig
from megatron_lance.ops.attention_trial import AttentionUnavailable, choose_attention
from megatron_lance.ops.attention_trial import Heads as AttentionHeads
from megatron_lance.ops.mape import inverse_frequencies
from megatron_lance.ops.qk_norm_mape import FusedUnavailable, choose_backend
from megatron_lance.parallel.dispatch import RankBatch


class LanceModel(MegatronModule):
    """Embedder (first stage), a TransformerBlock of dual-expert layers, heads (last stage).

    Args:
        config: megatron-core's.
        model: sizes and variants.
        tokenizer_size: ids the tokenizer uses.
        pre_process: whether this is the first stage.
        post_process: whether this is the last stage.
        vp_stage: virtual pipeline stage.
        mape_backend: of ops.qk_norm_mape; auto, fused or reference.
    """

    def __init__(
        self,
        config: DualExpertConfig,
        model: ModelConfig,
        tokenizer_size: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        mape_backend: str = "auto",
    ) -> None:
        super().__init__(config=config)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.model_config = model
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.embedder = Embedder(config, model, groups) if pre_process else None
        layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
        self.decoder = TransformerBlock(
            config,
            block_submodules(
                layers,
                parts_of(config),
                _attention_backend(config, model, groups.tp.size()),
                _mape_backend(model, mape_backend),
                model.mrope_section,
                model.qk_norm,
            ),
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        self.offload = Offload(config.offload_layers, device()) if config.offload_layers else None
        self.heads = Heads(config, model, tokenizer_size, groups) if post_process else None
        frequencies = inverse_frequencies(model.kv_channels, model.rotary_base, model.rope_inv_freq_dtype or "float32")
        self.inv_freq = nn.Buffer(frequencies.to(device()), persistent=False)

    def set_input_tensor(self, input_tensor: list[torch.Tensor] | torch.Tensor) -> None:
        """Take the previous stage's output, as megatron-core's schedules hand it over."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(tensors[0])

    def pack_context(self, batch: RankBatch, cache: KeyValueCache | None = None) -> PackContext:
        """What the layers need to know of the batch."""
        return PackContext(
            region_rows=batch.region_rows,
            shard_rows=batch.shard_rows,
            small=batch.small,
            plan=batch.plan,
            query_rows=batch.query_rows,
            row_queries=batch.row_queries,
            key_rows=batch.key_rows,
            key_tokens=batch.key_tokens,
            cache=cache,
            positions=batch.positions.to(torch.int32).contiguous(),
            inv_freq=self.inv_freq,
            offload=ForwardPass(self.offload) if self.offload and torch.is_grad_enabled() else None,
        )

    def forward(self, batch: RankBatch, cache: KeyValueCache | None = None) -> torch.Tensor | HeadOutputs:
        """One pack through this stage.

        Args:
            batch: the pack, or a part of its tokens.
            cache: keys and values of the pack, when `batch` is a part of it; without gradients.

        Returns:
            hidden states [s, 1, h], or the heads' outputs on the last stage.
        """
        hidden = self.embedder(batch) if self.embedder is not None else None
        context = self.pack_context(batch, cache)
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=context)
        if context.offload is not None:
            context.offload.finish()
        return hidden if self.heads is None else self.heads(hidden, batch)


def _attention_backend(config: DualExpertConfig, model: ModelConfig, tp: int) -> str:
    """The backend of the joint attention; with `auto` on GPUs all ranks take part in the choice."""
    heads = AttentionHeads(model.num_attention_heads // tp, max(1, model.num_query_groups // tp), model.kv_channels)
    try:
        return choose_attention(model.attention_backend, heads, config.params_dtype, device())
    except AttentionUnavailable as error:
        raise UserError(
            f"model.attention_backend = {model.attention_backend}: {error}; set auto, or another one that can serve"
        ) from None


def _mape_backend(model: ModelConfig, requested: str) -> str:
    """The backend of QK-norm and rotation; a model without QK-norm has nothing to fuse."""
    try:
        return choose_backend(requested if model.qk_norm else "reference", model.kv_channels, device())
    except FusedUnavailable as error:
        raise UserError(f"ops.mape = fused: {error}, or set ops.mape=auto") from None


def build_stages(
    config: DualExpertConfig, model: ModelConfig, tokenizer_size: int, mape_backend: str = "auto"
) -> list[LanceModel]:
    """The model chunks of this pipeline rank: one, or one per virtual stage.

    Args:
        config: megatron-core's.
        model: sizes and variants.
        tokenizer_size: ids the tokenizer uses.
        mape_backend: of ops.qk_norm_mape; auto, fused or reference.

    Raises:
        UserError: if `fused` was asked for and cannot serve.
    """
    chunks = config.virtual_pipeline_model_parallel_size or 1
    stages = []
    for chunk in range(chunks):
        vp_stage = chunk if config.virtual_pipeline_model_parallel_size else None
        stages.append(
            LanceModel(
                config,
                model,
                tokenizer_size,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                vp_stage=vp_stage,
                mape_backend=mape_backend,
            )
        )
    return stages
