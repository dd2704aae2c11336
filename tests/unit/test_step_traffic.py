"""Seconds of a transfer on links within and between nodes."""

from __future__ import annotations

import pytest

from megatron_lance.profiling.step_traffic import Links, Transfer

LINKS = Links(node_size=8, node_bandwidth=400e9, network_bandwidth=40e9, node_latency=1e-5, network_latency=3e-5)


def transfer(ranks: int, stride: int, axis: str = "dp", calls: int = 1, moved: float = 1e9) -> Transfer:
    return Transfer("something", axis, ranks, stride, calls, moved)


def test_a_group_within_a_node_takes_its_links() -> None:
    assert LINKS.seconds(transfer(8, 1)) == pytest.approx(1e9 / 400e9 + 3e-5)
    assert LINKS.seconds(transfer(2, 4, calls=10)) == pytest.approx(1e9 / 400e9 + 10e-5)
    assert LINKS.seconds(transfer(1, 1)) == 0.0


def test_ranks_of_a_node_share_what_comes_from_outside() -> None:
    """Sixteen ranks over two nodes: half of the whole comes from outside over eight adapters; alone in a node: all."""
    whole = 1e9 * 16 / 15
    assert LINKS.seconds(transfer(16, 1)) == pytest.approx(max(1e9 / 400e9, whole / 2 / 8 / 40e9) + 4 * 3e-5)
    assert LINKS.seconds(transfer(2, 8)) == pytest.approx(2e9 / 2 / 40e9 + 3e-5)
    assert LINKS.seconds(transfer(64, 8)) > LINKS.seconds(transfer(64, 1))


def test_a_send_goes_to_one_neighbour() -> None:
    assert LINKS.seconds(transfer(4, 2, "pp", calls=3)) == pytest.approx(1e9 / 400e9 + 3e-5)
    assert LINKS.seconds(transfer(4, 8, "pp", calls=3)) == pytest.approx(1e9 / 40e9 + 9e-5)
    assert LINKS.seconds(transfer(4, 4, "pp")) == LINKS.seconds(transfer(4, 8, "pp")), "the second send leaves the node"
