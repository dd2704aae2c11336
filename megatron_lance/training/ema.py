"""A running average of the trainable weights, in float32.

Station: optimizer -> [average] -> previews, checkpoints.  Each rank averages the share of the float32 weights that its
part of the distributed optimizer updates, so the average is sharded over data- and context-parallel ranks, and no rank
ever holds a second copy of its model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_lance.checkpoint.flat_shards import FlatShard

_AT_ONCE = 64  # tensors per fused update; bounds the memory it takes


class WeightAverage:
    """average <- decay * average + (1 - decay) * weight after every update; begins as the weights.

    Each of the three operations is rounded by itself, so the result does not depend on how weights are cut.

    Args:
        optimizer: distributed; holds this rank's share of the float32 weights.
        chunks: the model that the optimizer updates.
        decay: from 0 to below 1.

    Attributes:
        shards: this rank's share of the average.
    """

    def __init__(self, optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel], decay: float) -> None:
        self.parts, self.chunks, self.decay = optimizer.chained_optimizers, chunks, decay
        self.weights: list[torch.Tensor] = []
        self.shards: list[FlatShard] = []
        for part in self.parts:
            for parameter, (group, order) in part.model_param_group_index_map.items():
                weight = part.optimizer.param_groups[group]["params"][order].detach()
                start = part._get_model_param_range_map(parameter)["param"].start
                self.weights.append(weight)
                self.shards.append(FlatShard(parameter, start, weight.clone()))

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew as the weights of now."""
        for weight, shard in zip(self.weights, self.shards, strict=True):
            shard.data.copy_(weight)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of now; the host does not wait."""
        averages = [shard.data for shard in self.shards]
        for at in range(0, len(averages), _AT_ONCE):
            some = averages[at : at + _AT_ONCE]
            torch._foreach_mul_(some, self.decay)
            torch._foreach_add_(some, torch._foreach_mul(self.weights[at : at + _AT_ONCE], 1.0 - self.decay))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with averaged weights; afterwards it has its own again, bit for bit.  A collective of replicas."""
        self._sync()  # what the last update still sends
        self._exchange()
        yield
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange this rank's shares of weights and average, and gather the model from the former."""
        for weight, shard in zip(self.weights, self.shards, strict=True):
            own = weight.clone()
            weight.copy_(shard.data)
            shard.data.copy_(own)
        for part in self.parts:
            part._copy_main_params_to_model_params()
        self._sync()

    def _sync(self) -> None:
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)
