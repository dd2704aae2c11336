"""Where and on what a figure was measured.

Station: benchmarks and reports -> [provenance] -> their JSON files.
"""

from __future__ import annotations

import datetime
import os
import platform

import torch

from megatron_lance.config.code_version import commit


def provenance() -> dict[str, str | int]:
    """Device, cores, versions, commit and UTC time, as a benchmark's JSON carries them."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
