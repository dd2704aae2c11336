"""How a layout goes on to more devices: weak and strong scaling with what large runs lose.

Station: plan -> [scaling curves] -> tools/plan_parallelism.py.

Weak: the layout stays, replicas grow, each with as many packs a step as before.  Strong: packs per step stay, and at
every size the fastest layout that can still deal them is taken.  Packs are real ones, dealt as training deals them, so
steps wait for the slowest replica; pipeline bubble and collectives are those of the step-time model.

A checkpoint stops training for s seconds (weights and optimizer state of a rank to host memory; the rest is written
in the background).  With failures at rate r = devices / time between failures of one, the interval that loses least is
T = sqrt(2 s / r) (Young), and of every second trained

    s / T goes to checkpoints, and r (T / 2 + restart) to work done again and restarts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_lance.profiling.cluster import HOURS_BETWEEN_FAILURES, Cluster
from megatron_lance.profiling.planner import Choice, Wanted, plan, timed
from megatron_lance.profiling.step_time import Rates

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Devices that are looked at."""
HOST_BANDWIDTH = 10e9
"""Bytes/s from a device to pinned host memory while training stands still; a fifth of what PCIe 5 x16 reaches."""
RESTART_SECONDS = 600.0
"""From a failure to the first step again: notice, restart of all processes, load."""
LEAST_INTERVAL = 60.0
"""Seconds between checkpoints at least."""


@dataclass(frozen=True)
class Losses:
    """What a run loses beside its steps.

    Attributes:
        interval_seconds: between checkpoints.
        checkpoints: share of time.
        failures: share of time, work done again and restarts.
        goodput: what remains of it.
    """

    interval_seconds: float
    checkpoints: float
    failures: float
    goodput: float


def losses(stall_seconds: float, devices: int, hours: float = HOURS_BETWEEN_FAILURES) -> Losses:
    """Checkpoints and failures with the best interval.

    Args:
        stall_seconds: of a checkpoint.
        devices: of the run.
        hours: between failures of one device.
    """
    rate = devices / (hours * 3600)
    interval = max(math.sqrt(2 * stall_seconds / rate), LEAST_INTERVAL)
    saved, failed = stall_seconds / interval, rate * (interval / 2 + RESTART_SECONDS)
    return Losses(interval, saved, failed, 1 / (1 + saved + failed))


@dataclass(frozen=True)
class Point:
    """A size of cluster.

    Attributes:
        devices: how many.
        choice: the layout there.
        losses: beside the steps.
    """

    devices: int
    choice: Choice
    losses: Losses

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, after losses."""
        return self.choice.tokens_per_second * self.devices * self.losses.goodput

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "devices": self.devices,
            "layout": self.choice.name,
            "global_batch_size": self.choice.run.training.global_batch_size,
            "step_seconds": self.choice.time.seconds,
            "mfu": self.choice.mfu,
            "waiting_for_replicas": self.choice.time.parts["waiting for replicas"] / self.choice.time.seconds,
            "bubble": self.choice.time.parts["bubble"] / self.choice.time.seconds,
            "checkpoint_interval_seconds": self.losses.interval_seconds,
            "goodput": self.losses.goodput,
            "tokens_per_second": self.tokens_per_second,
        }


def _point(choice: Choice) -> Point:
    state = choice.memory.weight_bytes + choice.memory.optimizer_bytes
    return Point(choice.devices, choice, losses(state / HOST_BANDWIDTH, choice.devices))


def weak_scaling(choice: Choice, wanted: Wanted, cluster: Cluster, rates: Rates) -> list[Point]:
    """The layout on more and more devices, with as many packs per replica.

    Args:
        choice: the layout.
        wanted: what it was planned for.
        cluster: what its devices and links are.
        rates: of a device.
    """
    points = []
    replica = choice.devices // choice.degrees["dp"]
    for devices in SIZES:
        if devices % replica:
            continue
        packs = devices // replica * choice.micro_batches
        run = replace(choice.run, training=replace(choice.run.training, global_batch_size=packs))
        grown = replace(cluster, devices=devices)
        points.append(_point(timed(run, wanted, grown, rates, choice.micro_batches)))
    return points


def strong_scaling(wanted: Wanted, cluster: Cluster, rates: Rates, sizes: Sequence[int] = SIZES) -> list[Point]:
    """The fastest layout of every size for the recipe's packs per step; sizes without one are left out.

    Args:
        wanted: what to plan for.
        cluster: what its devices and links are.
        rates: of a device.
        sizes: devices.
    """
    points = []
    for devices in sizes:
        found = plan(wanted, replace(cluster, devices=devices), rates)
        if found.choices:
            points.append(_point(found.choices[0]))
    return points
