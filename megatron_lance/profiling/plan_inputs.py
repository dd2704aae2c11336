"""The packs that a plan is made for.

Station: stage, or pack index -> [packs of some steps] -> planner.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path

from megatron_lance.config.schema import ModelConfig
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.step_shape import token_cost
from megatron_lance.data.synthetic import STAGES, stage_samples
from megatron_lance.packing.packer import deal_packs, mask_pairs
from megatron_lance.packing.rng import stream
from megatron_lance.packing.sample import Pack
from megatron_lance.packing.step_packer import StepShape, pack_steps
from megatron_lance.profiling.flops import Work
from megatron_lance.profiling.step_time import Deal, PackShape

RECIPE_PACKS = {"pt": 91, "ct1": 49, "ct2": 49, "ct3": 49, "sft": 62}
"""Packs per step that follow from the paper's tokens seen, steps and tokens per rank (spec/recipes.md)."""


@dataclass(frozen=True)
class PlanPacks:
    """Packs of some steps.

    Attributes:
        capacity: tokens of a pack.
        packs: what each costs.
        source: stage or index.
        per_step: packs of a step, as the recipe has them or the index was made for.
    """

    capacity: int
    packs: tuple[PackShape, ...]
    source: str
    per_step: int

    def deal(self, replicas: int, micro_batches: int, steps: int = 4) -> Deal:
        """Steps of `replicas` x `micro_batches` packs each, dealt by mask pairs as training does.

        Packs come in their order, and once they are used up, drawn from an addressed stream.
        """
        size = replicas * micro_batches
        rng = stream(0, "plan packs", size)
        order = list(range(len(self.packs)))
        while len(order) < steps * size:
            order += rng.permutation(len(self.packs)).tolist()
        dealt = []
        for step in range(steps):
            chosen = order[step * size : (step + 1) * size]
            parts = deal_packs([self.packs[i].work.pairs for i in chosen], replicas)
            dealt.append([[chosen[i] for i in part] for part in parts])
        return dealt

    @cached_property
    def mean_work(self) -> Work:
        """Of a pack."""
        return Work.mean([pack.work for pack in self.packs])


@lru_cache(maxsize=8)
def stage_plan_packs(stage: str, steps: int = 4) -> PlanPacks:
    """Synthetic packs of a stage, formed step by step as prepack does.

    Args:
        stage: a key of STAGES.
        steps: of the recipe's packs.
    """
    settings = STAGES[stage]
    per_step = RECIPE_PACKS[stage] // 2 * 2
    needed = steps * per_step
    count = 8 * needed
    while True:
        samples = list(islice(stage_samples(stage, 0), count))
        groups = list(settings.shares())
        rows = [(s.length, mask_pairs(s.segments), groups.index(s.task)) for s in samples]
        shape = StepShape(settings.capacity, per_step, per_step // 2, token_cost(ModelConfig()), 4 * per_step, 1)
        packed = [pack for step in pack_steps(rows, shape, 0) for pack in step]
        if len(packed) > needed:
            packs = [Pack(tuple(samples[i] for i in group), settings.capacity) for group in packed[:needed]]
            shapes = tuple(PackShape.of(pack) for pack in packs)
            return PlanPacks(settings.capacity, shapes, f"synthetic {stage}", RECIPE_PACKS[stage])
        count *= 2


def index_plan_packs(folder: Path, steps: int = 4) -> PlanPacks:
    """The first packs of an index.

    Args:
        folder: written by tools/prepack.py.
        steps: of the packs that the index was made for; all packs where it has fewer.

    Raises:
        PackIndexError: if the index is missing or damaged.
    """
    index = PackIndex.open(folder)
    count = min(steps * index.shaping["global_batch_size"], len(index))
    packs = [index.pack(number).pack for number in range(count)]
    return PlanPacks(index.capacity, tuple(map(PackShape.of, packs)), str(folder), index.shaping["global_batch_size"])
