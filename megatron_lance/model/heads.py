"""From hidden states to per-row losses (spec/model.md section 6).

Station: layers -> [heads] -> losses.  Final norm per expert; the LM head on the rows that predict a label; llm2vae on
the generation rows.  Both heads run in every micro-batch, on rows of weight zero if need be.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megatron_lance.config.schema import ModelConfig
from megatron_lance.model.embedder import replicated_linear
from megatron_lance.model.layer_specs import RMSNorm
from megatron_lance.parallel.dispatch import RankBatch


@dataclass(frozen=True)
class HeadOutputs:
    """What the last stage computes for one pack.

    Attributes:
        logits: [k, vocab / tp], of the batch's CE rows; ids outside the tokenizer are -inf.
        ce: float32 [k], cross-entropy of the CE rows; the same on all tp ranks.
        velocity: [g, C], of this shard's generation rows.
    """

    logits: torch.Tensor
    ce: torch.Tensor
    velocity: torch.Tensor


class Heads(MegatronModule):
    """Final norms, LM head and velocity head.

    Args:
        config: megatron-core's.
        model: sizes.
        tokenizer_size: ids the tokenizer uses; rows of the LM head beyond it are masked.
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        tokenizer_size: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.und_norm = RMSNorm(config, model.hidden_size, model.layernorm_epsilon)
        self.gen_norm = RMSNorm(config, model.hidden_size, model.layernorm_epsilon)
        gathered = copy.copy(config)  # CE rows are whole on every tp rank: the head's input is not sharded
        gathered.sequence_parallel = False
        self.lm_head = ColumnParallelLinear(
            model.hidden_size,
            model.vocab_size,
            config=gathered,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=self.tp_group,
        )
        self.llm2vae = replicated_linear(model.hidden_size, model.latent_channels, config)
        shard = model.vocab_size // self.tp_group.size()
        self.used_columns = min(max(tokenizer_size - self.tp_group.rank() * shard, 0), shard)

    def _logits(self, und: torch.Tensor, ce_rows: torch.Tensor) -> torch.Tensor:
        """Normed und rows of this shard [u, 1, h] -> logits of the CE rows [k, vocab / tp]."""
        if self.config.sequence_parallel:
            # every tp rank runs the same rows, so the gradient is whole on each and is only split
            und = gather_from_sequence_parallel_region(und, tensor_parallel_output_grad=False, group=self.tp_group)
        logits, _ = self.lm_head(und.squeeze(1).index_select(0, ce_rows))
        unused = torch.arange(logits.shape[-1], device=logits.device) >= self.used_columns
        return logits.masked_fill(unused, float("-inf"))

    def forward(self, hidden: torch.Tensor, batch: RankBatch) -> HeadOutputs:
        """Hidden states of the last layer [s, 1, h] -> per-row outputs."""
        und, gen = hidden.split(list(batch.shard_rows))
        logits = self._logits(self.und_norm(und), batch.ce_rows)
        # a copy: megatron-core turns the tensor it is given into probabilities in place
        ce = vocab_parallel_cross_entropy(logits.to(torch.float32, copy=True), batch.ce_labels)
        return HeadOutputs(logits, ce, self.llm2vae(self.gen_norm(gen)).squeeze(1))
