"""Which code runs, for what it writes: checkpoints, benchmarks, reports."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

UNKNOWN = "unknown"


@cache
def commit() -> str:
    """The commit of the checkout the package runs from, "-dirty" if tracked files differ; "unknown" without git."""
    folder = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        return UNKNOWN
    return done.stdout.strip() if done.returncode == 0 else UNKNOWN


def code_version() -> str:
    """Version of the installed package, and the commit where it runs from a checkout."""
    try:
        version = metadata.version("megatron-lance")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return version if commit() == UNKNOWN else f"{version}, commit {commit()}"
