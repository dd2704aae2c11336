"""Sharing out the media of a step over the ranks of a replica."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.shares import packs_of_replica, share_out
from tests.tiny import TinyRun

COSTS = st.lists(st.integers(0, 1000), max_size=40)
RANKS = st.integers(1, 8)


def loads(costs: list[int], owner: list[int], ranks: int) -> list[int]:
    return [sum(c for c, r in zip(costs, owner, strict=True) if r == rank) for rank in range(ranks)]


@settings(deadline=None)
@given(COSTS, RANKS)
def test_every_job_has_one_rank_and_no_rank_far_more_than_its_share(costs: list[int], ranks: int) -> None:
    owner = share_out(costs, ranks)
    assert len(owner) == len(costs) and all(0 <= rank < ranks for rank in owner)
    assert owner == share_out(costs, ranks)
    # The last job of the fullest rank went there when that rank had the least, so at most the mean of all others.
    assert max(loads(costs, owner, ranks)) <= sum(costs) / ranks + max(costs, default=0) * (1 - 1 / ranks)


@settings(deadline=None)
@given(st.integers(0, 30), RANKS, st.integers(1, 9))
def test_equal_jobs_are_dealt_evenly(count: int, ranks: int, cost: int) -> None:
    owner = share_out([cost] * count, ranks)
    numbers = [owner.count(rank) for rank in range(ranks)]
    assert max(numbers) - min(numbers) <= 1


@settings(deadline=None)
@given(COSTS.filter(bool), RANKS)
def test_the_order_of_jobs_does_not_change_the_balance(costs: list[int], ranks: int) -> None:
    turned = costs[::-1]
    assert sorted(loads(costs, share_out(costs, ranks), ranks)) == sorted(
        loads(turned, share_out(turned, ranks), ranks)
    )


def test_the_most_expensive_jobs_are_kept_apart() -> None:
    assert share_out([1, 8, 1, 8, 1], 2) == [0, 0, 1, 1, 0]
    assert share_out([], 3) == []


def test_replicas_get_packs_of_the_same_work_not_of_the_same_mask(tiny_run: TinyRun) -> None:
    """A pack of many tokens and few mask pairs is costly too."""
    pack = PackIndex.open(tiny_run.load().data.pack_index).pack(0)
    values = ((1, 8), (2, 1), (3, 7), (4, 2))
    packs = [replace(pack, number=n, mask_pairs=pairs, cost=cost) for n, (pairs, cost) in enumerate(values)]
    dealt = [packs_of_replica(packs, 2, replica) for replica in range(2)]
    assert sorted(sum(packs[n].cost for n in part) for part in dealt) == [9, 9]
    assert sorted(n for part in dealt for n in part) == [0, 1, 2, 3]
