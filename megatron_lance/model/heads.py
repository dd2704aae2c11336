"""From hidden states to per-row losses (spec/model.md section 6).

Station: layers -> [heads] -> losses.  Final norm per expert; the LM head on the rows that predict a label, with their
cross-entropy; llm2vae on the generation rows.  Both heads run in every micro-batch, on rows of weight zero if need be.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megatron_lance.config.schema import ModelConfig
from megatron_lance.model.embedder import replicated_linear
from megatron_lance.model.layer_specs import RMSNorm
from megatron_lance.ops.head_cross_entropy import head_cross_entropy, head_logits
from megatron_lance.parallel.dispatch import RankBatch


class LanguageHead(ColumnParallelLinear):
    """The LM head's weight, [vocab / tp, h], and what is made of it.

    Calling it waits for the weight, if megatron-core gathers it in the background, and gives the cross-entropy.

    Args:
        config: megatron-core's.
        model: sizes, and the rows whose logits exist at a time.
        tokenizer_size: ids the tokenizer uses; those beyond it have probability 0.
        tp_group: the tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, model: ModelConfig, tokenizer_size: int, tp_group: dist.ProcessGroup
    ) -> None:
        whole = copy.copy(config)  # its rows are whole on every tp rank
        whole.sequence_parallel = whole.gradient_accumulation_fusion = False
        super().__init__(
            model.hidden_size,
            model.vocab_size,
            config=whole,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=tp_group,
        )
        self.chunk_rows = model.ce_chunk_rows
        shard = model.vocab_size // tp_group.size()
        self.used_columns = min(max(tokenizer_size - tp_group.rank() * shard, 0), shard)

    def forward(self, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """[k, h] and int64 [k], the same on all tp ranks -> cross-entropy, float32 [k]."""
        return head_cross_entropy(rows, self.weight, labels, self.used_columns, self.chunk_rows, self.tp_group)


@dataclass(frozen=True)
class HeadOutputs:
    """What the last stage computes for one pack.

    Attributes:
        rows: [k, h], normed hidden states of the batch's CE rows, the same on all tp ranks.
        head: what makes logits of them.
        ce: float32 [k], cross-entropy of the CE rows; the same on all tp ranks.
        velocity: [g, C], of this shard's generation rows.
    """

    rows: torch.Tensor
    head: LanguageHead
    ce: torch.Tensor
    velocity: torch.Tensor

    @property
    def logits(self) -> torch.Tensor:
        """[k, vocab / tp], of the batch's CE rows, computed when asked for; ids outside the tokenizer are -inf."""
        return head_logits(self.rows, self.head.weight, self.head.used_columns)


class Heads(MegatronModule):
    """Final norms, LM head and velocity head.

    Args:
        config: megatron-core's.
        model: sizes.
        tokenizer_size: ids the tokenizer uses.
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
        self.lm_head = LanguageHead(config, model, tokenizer_size, self.tp_group)
        self.llm2vae = replicated_linear(model.hidden_size, model.latent_channels, config)

    def _ce_rows(self, und: torch.Tensor, ce_rows: torch.Tensor) -> torch.Tensor:
        """Normed und rows of this shard [u, 1, h] -> those of the whole region that predict a label [k, h]."""
        if self.config.sequence_parallel:
            # every tp rank runs the same rows, so the gradient is whole on each and is only split
            und = gather_from_sequence_parallel_region(und, tensor_parallel_output_grad=False, group=self.tp_group)
        return und.squeeze(1).index_select(0, ce_rows)

    def forward(self, hidden: torch.Tensor, batch: RankBatch) -> HeadOutputs:
        """Hidden states of the last layer [s, 1, h] -> per-row outputs."""
        und, gen = hidden.split(list(batch.shard_rows))
        rows = self._ce_rows(self.und_norm(und), batch.ce_rows)
        ce = self.lm_head(rows, batch.ce_labels)
        return HeadOutputs(rows, self.lm_head, ce, self.llm2vae(self.gen_norm(gen)).squeeze(1))
