"""What a command line's first screen leaves out, and what it does not."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from megatron_lance.config.logs import hide_library_warnings
from tests.shared import REPOSITORY

FALLS_BACK = "Transformer Engine and Apex are not installed. Falling back to Torch optimizers."
SCRIPT = f"""
import warnings
import megatron_lance
for name, message in (
    ("megatron.core.optimizer", {FALLS_BACK!r}),
    ("megatron.core.optimizer", "something else"),
    ("elsewhere", {FALLS_BACK!r}),
):
    warnings.warn_explicit(message, UserWarning, f"{{name}}.py", 1, module=name)
"""


def test_only_the_notice_of_missing_libraries_is_left_out_from_the_start() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "Warning" in line]
    assert lines == [
        "megatron.core.optimizer.py:1: UserWarning: something else",
        f"elsewhere.py:1: UserWarning: {FALLS_BACK}",
    ]


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(), reason="torch for GPUs misses one, and says so"
)
def test_a_tool_that_imports_megatron_core_at_once_starts_quietly() -> None:
    line = [sys.executable, "tools/sample.py", "--help"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("module", "shown"),
    [("megatron.core.x", False), ("torch.x", False), ("torchvision", True), ("megatron_lance.x", True)],
)
def test_warnings_of_this_package_are_not_taken_for_the_libraries(module: str, shown: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hide_library_warnings()
        warnings.warn_explicit("noticed", UserWarning, "file.py", 1, module=module)
    assert bool(seen) is shown
