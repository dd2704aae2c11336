"""Call a command line in this process as its file would, and catch what it says."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_lance.config.errors import run_command
from megatron_lance.parallel import groups
from megatron_lance.training import train
from tools import (
    bench,
    check_equivalence,
    check_parity,
    convert_checkpoint,
    encode_latents,
    gpu_check,
    inspect_pack,
    judge_demo,
    plan_parallelism,
    prepack,
    profile_throughput,
    report,
    run_demo,
    run_stages,
    sample,
)

COMMANDS: dict[str, Callable[[], int]] = {
    "train": train.main,
    "prepack": prepack.main,
    "encode_latents": encode_latents.main,
    "inspect_pack": inspect_pack.main,
    "bench": bench.main,
    "check_equivalence": check_equivalence.main,
    "check_parity": check_parity.main,
    "convert_checkpoint": convert_checkpoint.main,
    "sample": sample.main,
    "judge_demo": judge_demo.main,
    "report": report.main,
    "plan_parallelism": plan_parallelism.main,
    "profile_throughput": profile_throughput.main,
    "gpu_check": gpu_check.main,
    "run_demo": run_demo.main,
    "run_stages": run_stages.main,
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


class Commander:
    """Runs command lines such as `train --config tiny.yaml`, in the current folder and process.

    Args:
        monkeypatch: sets arguments and environment for the time of the test.
        capsys: catches output.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, line: str, *, ranks: int = 1, rank: int = 0, folder: Path | None = None) -> Outcome:
        """Run one command line as rank `rank` of `ranks`, in `folder`."""
        name, *arguments = shlex.split(line)
        root = logging.getLogger()
        handlers, level = list(root.handlers), root.level
        with self.monkeypatch.context() as patch, warnings.catch_warnings():
            patch.setattr(sys, "argv", [name, *arguments])
            for variable, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", ranks)):
                patch.setitem(os.environ, variable, str(value))
            patch.chdir(folder or Path.cwd())
            self.capsys.readouterr()
            try:
                code = run_command(name, partial(COMMANDS[name]))
            except SystemExit as end:  # argparse
                code = end.code if isinstance(end.code, int) else 1
            finally:
                if dist.is_initialized():
                    groups.destroy()
                root.handlers[:], root.level = handlers, level
        out, err = self.capsys.readouterr()
        return Outcome(code, out, err)
