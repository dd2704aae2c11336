"""Where the time of a profiled step goes: a chrome trace of torch.profiler, summed up by part.

Station: marked modules -> torch.profiler -> chrome trace -> [seconds by part] -> throughput report.

`marked` names the parts: ranges around forward passes of modules (and `part` around anything else).  A backward
operator belongs to the part of the forward operator with its sequence number; recomputed ones run within a range again.
Work is what operators do on a CPU, and kernels on a GPU; communication is what gloo or NCCL have in flight, exposed
where no work runs meanwhile.  Waiting for data is its whole range but for what else happens in it.  The rest of the
step is the host's own time (Python, launches) or waiting.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.autograd.profiler import record_function

from megatron_lance.model.lance_model import LanceModel

PREFIX = "part: "
PARTS = (
    "encoders",
    "linears und",
    "linears gen",
    "attention",
    "mape",
    "norms and activations",
    "embedder",
    "heads",
    "optimizer",
    "data wait",
    "other",
)
"""Parts of work, in the order they are shown."""
WAIT, EXPOSED, IDLE = "data wait", "exposed communication", "host and waiting"
Interval = tuple[float, float]


def part(name: str) -> record_function:
    """A range whose work belongs to a part."""
    return record_function(PREFIX + name)


@contextmanager
def marked(stages: Sequence[LanceModel], encoders: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Mark the forward passes of a model's parts while entered.

    Args:
        stages: model chunks of this rank.
        encoders: frozen encoders.
    """
    handles: list[Any] = []

    def mark(module: nn.Module | None, name: str) -> None:
        """A range around each forward pass of a module; nothing where a pipeline stage has no such module."""
        if module is None:
            return
        ranges: list[record_function] = []

        def enter(*_: Any) -> None:
            ranges.append(part(name))
            ranges[-1].__enter__()

        def leave(*_: Any) -> None:
            ranges.pop().__exit__(None, None, None)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))

    for stage in stages:
        mark(stage.embedder, "embedder")
        mark(stage.heads, "heads")
        for layer in stage.decoder.layers:
            mark(layer.joint_attention, "attention")
            for name, expert in (("und", layer.und), ("gen", layer.gen)):
                for linear in (
                    expert.self_attention.linear_qkv,
                    expert.self_attention.linear_proj,
                    expert.mlp.linear_fc1,
                    expert.mlp.linear_fc2,
                ):
                    mark(linear, f"linears {name}")
                for module in (expert.input_layernorm, expert.pre_mlp_layernorm, expert.mlp):
                    mark(module, "norms and activations")
    for encoder in encoders:
        mark(encoder, "encoders")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class StepTrace:
    """A step's time on one rank.

    Attributes:
        seconds: of the whole step.
        parts: seconds of work by part, of exposed communication, and of the host alone.
        communication: seconds in which something was in flight.
    """

    seconds: float
    parts: dict[str, float]
    communication: float


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint ascending intervals that cover the same."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        elif stop > start:
            found.append((start, stop))
    return found


def length(intervals: Iterable[Interval]) -> float:
    """Of disjoint intervals together."""
    return sum(stop - start for start, stop in intervals)


def overlap(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """Length of what two lists of disjoint ascending intervals share."""
    starts, total = [start for start, _ in b], 0.0
    for start, stop in a:
        at = max(bisect_left(starts, start) - 1, 0)
        while at < len(b) and b[at][0] < stop:
            total += max(0.0, min(stop, b[at][1]) - max(start, b[at][0]))
            at += 1
    return total


def _is_work(name: str) -> bool:
    return name.startswith(("aten::", "megatron_lance::"))


def _is_communication(name: str) -> bool:
    return name.lower().startswith(("gloo:", "nccl", "nccldevkernel"))


def _spans(events: Iterable[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Complete events with a duration by (process, thread), parents before children."""
    threads: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation"):
            threads[event["pid"], event["tid"]].append(event)
    for spans in threads.values():
        spans.sort(key=lambda event: (event["ts"], -event["dur"]))
    return threads


def _nested(spans: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each event of a thread with the events around it, outermost first."""
    around: list[dict[str, Any]] = []
    for event in spans:
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
            around.pop()
        yield event, around
        around.append(event)


def _forward_parts(threads: Iterable[Sequence[dict[str, Any]]]) -> dict[int, str]:
    """Part of each sequence number: that of the last forward event with it, which made the backward node."""
    latest: dict[int, tuple[float, str]] = {}
    for spans in threads:
        for event, around in _nested(spans):
            number = event.get("args", {}).get("Sequence number", -1)
            if number < 0 or any(_is_backward(outer) for outer in (*around, event)):
                continue
            inside = next((o["name"] for o in reversed(around) if o["name"].startswith(PREFIX)), None)
            if inside and event["ts"] >= latest.get(number, (-1.0, ""))[0]:
                latest[number] = (event["ts"], inside.removeprefix(PREFIX))
    return {number: name for number, (_, name) in latest.items()}


def _is_backward(event: dict[str, Any]) -> bool:
    return str(event["name"]).startswith("autograd::engine::evaluate_function")


def _part_of(around: Sequence[dict[str, Any]], forward: dict[int, str]) -> str:
    """Innermost range or backward node."""
    for outer in reversed(around):
        if outer["name"].startswith(PREFIX):
            return str(outer["name"]).removeprefix(PREFIX)
        if _is_backward(outer):
            known = forward.get(outer.get("args", {}).get("Sequence number", -1))
            if known is not None:
                return known
    return "other"


def read_trace(trace: dict[str, Any], step: str) -> StepTrace:
    """Sum up one step of a chrome trace.

    Args:
        trace: what torch.profiler exported.
        step: name of the range around the step.

    Raises:
        ValueError: if there is no such range.
    """
    events: list[dict[str, Any]] = trace["traceEvents"]
    ranges = [e for e in events if e.get("ph") == "X" and e.get("name") == step and e.get("cat") == "user_annotation"]
    if not ranges:
        raise ValueError(f"trace: has no range {step!r}")
    begin, end = ranges[0]["ts"], ranges[0]["ts"] + ranges[0]["dur"]
    threads = _spans(e for e in events if e.get("ph") == "X" and begin <= e["ts"] <= end)
    forward = _forward_parts(threads.values())
    by_part: dict[str, list[Interval]] = defaultdict(list)
    of_launch: dict[int, str] = {}
    for spans in threads.values():
        for event, around in _nested(spans):
            own = event.get("args", {}).get("External id")
            if own is not None:
                of_launch[own] = _part_of((*around, event), forward)
            if _is_work(event["name"]) and not any(_is_work(outer["name"]) for outer in around):
                by_part[_part_of(around, forward)].append((event["ts"], event["ts"] + event["dur"]))
    flights = [e for e in events if e.get("ph") == "X" and _is_communication(str(e.get("name", "")))]
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        by_part = _device_parts(kernels, of_launch)
        flights = [e for e in kernels if _is_communication(e["name"])]
    waits = (event for spans in threads.values() for event in spans if event["name"] == PREFIX + WAIT)
    by_part[WAIT] += [(event["ts"], event["ts"] + event["dur"]) for event in waits]
    return _summary(by_part, flights, begin, end)


def _device_parts(kernels: Sequence[dict[str, Any]], of_launch: dict[int, str]) -> dict[str, list[Interval]]:
    """Intervals of kernels by the part of the operator that launched them."""
    by_part: dict[str, list[Interval]] = defaultdict(list)
    for kernel in kernels:
        if not _is_communication(kernel["name"]):
            name = of_launch.get(kernel.get("args", {}).get("External id", -1), "other")
            by_part[name].append((kernel["ts"], kernel["ts"] + kernel["dur"]))
    return by_part


def _summary(
    by_part: dict[str, list[Interval]], flights: Sequence[dict[str, Any]], begin: float, end: float
) -> StepTrace:
    """Seconds of each part; microseconds in the trace."""
    work = union(interval for name, intervals in by_part.items() if name != WAIT for interval in intervals)
    flying = union((max(e["ts"], begin), min(e["ts"] + e["dur"], end)) for e in flights)
    exposed = length(flying) - overlap(flying, work)
    waits = union(by_part[WAIT])
    waited = length(waits) - overlap(waits, union([*work, *flying]))
    parts = {name: length(union(by_part.get(name, ()))) / 1e6 for name in PARTS}
    parts[WAIT], parts[EXPOSED] = waited / 1e6, exposed / 1e6
    parts[IDLE] = max(end - begin - length(work) - exposed - waited, 0.0) / 1e6
    return StepTrace((end - begin) / 1e6, parts, length(flying) / 1e6)
