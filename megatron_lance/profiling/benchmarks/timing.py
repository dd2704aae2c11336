"""How benchmarks time something that is done many times.

Station: a body -> [times, percentiles] -> the figures of a benchmark.  On a GPU by events, and what lies in its cache
is overwritten between runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

# Written between two runs on a GPU, so that nothing is found in its cache; enough to take longer than Python needs to
# launch a body, so that the time is the GPU's and not the launch's.
_FLUSH_BYTES = 2 << 30
_WARMUP = 3


def run_times(body: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of each run, after a few that are not timed.

    Args:
        body: what is timed.
        repeats: timed runs.
        device: it runs on.
    """
    for _ in range(_WARMUP):
        body()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            body()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start_event, end_event in pairs:
        flush.zero_()
        start_event.record()
        body()
        end_event.record()
    torch.cuda.synchronize(device)
    return [start_event.elapsed_time(end_event) for start_event, end_event in pairs]


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile of times in milliseconds."""
    values = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return dict(zip(("p20_ms", "p50_ms", "p80_ms"), values, strict=True))


def here() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
