"""The model as one pipeline stage (or one virtual stage) of it.

Station: dispatch -> [embedder -> dual-expert layers -> heads] -> losses.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from torch import nn

from megatron_lance.config.schema import ModelConfig
from megatron_lance.model.embedder import Embedder
from megatron_lance.model.heads import HeadOutputs, Heads
from megatron_lance.model.joint_attention import PackContext
from megatron_lance.model.layer_specs import block_submodules, device
from megatron_lance.ops.mape import frequency_axes, inverse_frequencies, rotary_angles
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
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        tokenizer_size: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
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
            block_submodules(layers, model.attention_backend),
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        self.heads = Heads(config, model, tokenizer_size, groups) if post_process else None
        frequencies = inverse_frequencies(model.kv_channels, model.rotary_base, model.rope_inv_freq_dtype or "float32")
        self.inv_freq = nn.Buffer(frequencies.to(device()), persistent=False)
        self.frequency_axes = nn.Buffer(frequency_axes(model.mrope_section).to(device()), persistent=False)

    def set_input_tensor(self, input_tensor: list[torch.Tensor] | torch.Tensor) -> None:
        """Take the previous stage's output, as megatron-core's schedules hand it over."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(tensors[0])

    def pack_context(self, batch: RankBatch) -> PackContext:
        """What the layers need to know of the batch; angles are computed here once for all layers."""
        cos, sin = rotary_angles(batch.positions, self.inv_freq, self.frequency_axes)
        return PackContext(
            region_rows=batch.region_rows,
            shard_rows=batch.shard_rows,
            plan=batch.plan,
            query_rows=batch.query_rows,
            row_queries=batch.row_queries,
            key_rows=batch.key_rows,
            cos=cos,
            sin=sin,
        )

    def forward(self, batch: RankBatch) -> torch.Tensor | HeadOutputs:
        """One pack through this stage.

        Returns:
            hidden states [s, 1, h], or the heads' outputs on the last stage.
        """
        hidden = self.embedder(batch) if self.embedder is not None else None
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=self.pack_context(batch))
        return hidden if self.heads is None else self.heads(hidden, batch)


def build_stages(config: TransformerConfig, model: ModelConfig, tokenizer_size: int) -> list[LanceModel]:
    """The model chunks of this pipeline rank: one, or one per virtual stage."""
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
            )
        )
    return stages
