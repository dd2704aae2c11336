"""From token ids, ViT output and noisy latents to hidden states (spec/model.md sections 2 and 5).

Station: dispatch -> [embedder] -> layers.  Text and markers: word embedding.  ViT content: ViT output as it is.  VAE
content: vae2llm(x_t) + time_embedder(t) + latent position.  Padding rows are zero.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_lance.config.schema import ModelConfig
from megatron_lance.model.layer_specs import device
from megatron_lance.parallel.dispatch import RankBatch

TIME_FREQUENCIES = 128


def shard_replicated(linear: nn.Linear, config: TransformerConfig) -> nn.Linear:
    """Mark a linear that runs on sequence-sharded rows, so that its gradients are summed over tp ranks."""
    for parameter in linear.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return linear


def replicated_linear(inputs: int, outputs: int, config: TransformerConfig) -> nn.Linear:
    """A small linear with bias that every tp rank holds whole and applies to its own rows."""
    return shard_replicated(nn.Linear(inputs, outputs, dtype=config.params_dtype, device=device()), config)


def sincos_axis(count: int, dim: int) -> torch.Tensor:
    """Sin-cos embedding of 0..count-1: [count, dim], [sin, cos], omega_m = 1e4^(-m/(dim/2)); float64, then float32."""
    omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    angles = np.outer(np.arange(count, dtype=np.float64), omega)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], axis=1)).float()


class LatentPosition(nn.Module):
    """The frozen latent position table, kept per axis: row (i, j, k) is the concatenation of its axes' rows.

    Cell (i, j, k) reads row i*M*M + j*M + k of the table, as the release does, so a side longer than M cells
    continues in the next row's places (a 768-pixel 21:9 image has 72 columns and M is 64).

    Args:
        frames: rows along time.
        size: rows along height and along width.
        hidden: channels; d_t = d_h = largest even number <= hidden / 3, d_w the rest.
    """

    def __init__(self, frames: int, size: int, hidden: int) -> None:
        super().__init__()
        third = hidden // 3 // 2 * 2
        self.size = size
        self.t = nn.Buffer(sincos_axis(frames, third), persistent=False)
        self.h = nn.Buffer(sincos_axis(size, third), persistent=False)
        self.w = nn.Buffer(sincos_axis(size, hidden - 2 * third), persistent=False)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Grid cells int64 [g, 3] -> float32 [g, hidden]."""
        m = self.size
        row = grid[:, 0] * m * m + grid[:, 1] * m + grid[:, 2]
        return torch.cat([self.t[row // (m * m)], self.h[row // m % m], self.w[row % m]], dim=-1)


class TimeEmbedder(nn.Module):
    """Embedding of the flow timestep: [cos, sin] of 128 frequencies, Linear - SiLU - Linear.

    Args:
        config: supplies hidden size and dtype.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dtype = config.params_dtype
        self.mlp = nn.Sequential(
            replicated_linear(2 * TIME_FREQUENCIES, config.hidden_size, config),
            nn.SiLU(),
            replicated_linear(config.hidden_size, config.hidden_size, config),
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """float32 [m], not scaled -> [m, hidden]."""
        steps = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) * steps / TIME_FREQUENCIES)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(self.dtype))


class Embedder(MegatronModule):
    """Hidden states of the first pipeline stage.

    Args:
        config: megatron-core's.
        model: sizes of vocabulary, latents and position table.
        pg_collection: process groups.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        self.word_embeddings = VocabParallelEmbedding(
            model.vocab_size,
            model.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=pg_collection.tp,
        )
        self.vae2llm = replicated_linear(model.latent_channels, model.hidden_size, config)
        self.time_embedder = TimeEmbedder(config)
        self.latent_position = LatentPosition(
            model.latent_position_frames, model.latent_position_size, model.hidden_size
        )
        self.latent_position.to(device())

    def _und(self, batch: RankBatch) -> torch.Tensor:
        """Understanding rows of this shard: [u, h]."""
        words = self.word_embeddings(batch.token_ids[None])  # [1, U] -> [u, 1, h] (sharded) or [1, U, h]
        words = words.reshape(-1, words.shape[-1])
        return (words * batch.text_mask).index_copy(0, batch.vit_rows, batch.vit)

    def _gen(self, batch: RankBatch) -> torch.Tensor:
        """Generation rows of this shard: [g, h]."""
        latents = self.vae2llm(batch.noisy_latents)
        times = F.embedding(batch.timestep_index, self.time_embedder(batch.timesteps))
        places = self.latent_position(batch.grid).to(latents.dtype)
        return (latents + times + places) * batch.gen_mask

    def forward(self, batch: RankBatch) -> torch.Tensor:
        """The rows of this rank's shard, [und | gen]: [s, 1, h]."""
        return torch.cat([self._und(batch), self._gen(batch)]).unsqueeze(1)
