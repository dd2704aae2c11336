"""Figures of a step that only all ranks together know: the gradient norm of each expert, and the memory peak.

Station: gradients, reduced and ready for the update -> [gauges] -> update -> metrics.  Each rank adds up squares of the
gradient shards that its optimizer updates; those of all ranks together give the same norms on every layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_lance.checkpoint.hf_lance import global_parameters
from megatron_lance.model.lance_model import LanceModel

PARTS = ("und", "gen", "shared")
"""What gradient norms are of: the experts' layers and final norms; embeddings, heads, connectors, time embedder."""


def part_of(name: str) -> str:
    """Which of PARTS the parameter of a global name belongs to."""
    for expert in ("und", "gen"):
        if f".{expert}." in name or name.startswith(f"heads.{expert}_norm."):
            return expert
    return "shared"


@dataclass(frozen=True)
class Readings:
    """Figures of all ranks.

    Attributes:
        norms: of the gradients of each of PARTS, before clipping.
        memory_bytes: the most of any rank.
    """

    norms: dict[str, float]
    memory_bytes: int

    @classmethod
    def of(cls, everyone: torch.Tensor) -> Readings:
        """From what `Gauges.own` tells on every rank, float64 [ranks, parts + 1]."""
        *squares, memory = everyone.T.tolist()
        norms = {part: math.sqrt(sum(of_ranks)) for part, of_ranks in zip(PARTS, squares, strict=True)}
        return cls(norms, int(max(memory)))


class Gauges:
    """Reads norms and memory of this rank.

    Args:
        optimizer: over the stages.
        stages: the model chunks of this pipeline rank.
    """

    def __init__(self, optimizer: MegatronOptimizer, stages: Sequence[LanceModel]) -> None:
        names = {parameter: name for name, parameter in global_parameters(stages)}
        self.device = next(stages[0].parameters()).device
        self.shards: dict[str, list[torch.Tensor]] = {part: [] for part in PARTS}
        for optimized in optimizer.chained_optimizers:
            for parameter, shard in _shards(optimized, list(names)):
                if param_is_not_tensor_parallel_duplicate(parameter):
                    self.shards[part_of(names[parameter])].append(shard)

    @torch.no_grad()
    def own(self) -> torch.Tensor:
        """This rank's part of the squares by part, and its memory in bytes, float64 [parts + 1].

        Device memory is the peak of tensors since the last call; a CPU has no such count and tells the resident memory
        of its process.
        """
        own = [self._square(part) for part in PARTS] + [torch.tensor(float(self._memory()), device=self.device)]
        return torch.stack([value.double() for value in own])

    def _square(self, part: str) -> torch.Tensor:
        """Sum of squares of this rank's gradients of a part; their norms are taken tensor by tensor."""
        gradients = [shard.grad for shard in self.shards[part] if shard.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.device)
        return torch.stack(torch._foreach_norm(gradients)).double().square().sum()

    def _memory(self) -> int:
        if self.device.type != "cuda":
            return int(psutil.Process().memory_info().rss)
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


def _shards(
    optimizer: MegatronOptimizer, parameters: Sequence[torch.nn.Parameter]
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(parameter, what of its float32 weights this rank updates); a weight that several ranks update is one rank's."""
    if isinstance(optimizer, DistributedOptimizer):
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            yield parameter, optimizer.optimizer.param_groups[group]["params"][order]
    elif parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        for parameter in parameters:
            if parameter.requires_grad:
                yield parameter, getattr(parameter, "main_param", parameter)
