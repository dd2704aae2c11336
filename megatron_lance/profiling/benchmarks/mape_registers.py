"""What nvcc makes of the CUDA kernels of QK-norm and MaPE: registers, spills and shared memory per architecture."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from megatron_lance.config.errors import UserError

SUMMARY = "registers and spills of the CUDA kernels (needs nvcc, no GPU)"
SOURCES = Path(__file__).resolve().parents[3] / "kernels" / "csrc"

_ENTRY = re.compile(
    r"Compiling entry function '\w*?(forward_kernel|backward_kernel|weight_kernel)I(.*?)EEv\w*' for '(\w+)'"
    r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)
_ELEMENTS = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def _nvcc() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise UserError("nvcc: not on PATH; install the CUDA compiler or add its folder to PATH")
    return nvcc


def cuda_include() -> Path:
    """The folder of CUDA's headers."""
    command = [_nvcc(), "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
    if found is None:
        raise UserError(f"{command[0]}: does not tell its folder with --dryrun; use nvcc of CUDA 13")
    return Path(found[1]) / "include"


def _read(text: str) -> list[dict[str, Any]]:
    """Entries of ptxas' verbose output."""
    entries = []
    for kernel, arguments, architecture, stack, stores, loads, registers in _ENTRY.findall(text):
        element, *numbers = re.fullmatch(r"(f|6__half|13__nv_bfloat16)(?:Li(\d+)ELi(\d+)E)?", arguments).groups()  # type: ignore[union-attr]
        entries.append(
            {
                "kernel": kernel.removesuffix("_kernel"),
                "element": _ELEMENTS[element],
                "vector": int(numbers[0] or 0),  # elements per access
                "lanes_per_head": int(numbers[1] or 0),  # 0: decided at run time
                "architecture": architecture,
                "registers": int(registers),
                "stack_bytes": int(stack),
                "spill_bytes": int(stores) + int(loads),
            }
        )
    return entries


def compile_all() -> list[dict[str, Any]]:
    """Compile every kernel for every architecture, warnings being errors.

    Raises:
        UserError: if there is no nvcc or it refuses.
    """
    entries = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(SOURCES.glob("*.cu")):
            flags = ["--options-file", str(SOURCES / "nvcc.flags"), "-Xptxas", "-v", "--threads", "2"]
            command = [_nvcc(), *flags, "-c", str(source), "-o", str(Path(folder, source.stem))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"{source.name}: nvcc refuses it: {done.stderr.strip()}")
            entries += _read(done.stderr + done.stdout)
    return sorted(entries, key=lambda e: [str(v) for v in e.values()])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compile; the result is the same for every run of one nvcc."""
    version = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return {"nvcc": version.strip().splitlines()[-1], "kernels": compile_all()}


def table(result: dict[str, Any]) -> str:
    """A line per kernel and architecture."""
    lines = [f"{result['nvcc']}", "kernel    element   vector lanes  arch    registers  stack  spills"]
    for e in result["kernels"]:
        lines.append(
            f"{e['kernel']:<9} {e['element']:<9} {e['vector'] or '-':>6} {e['lanes_per_head'] or '-':>5}  "
            f"{e['architecture']:<7} {e['registers']:>9} {e['stack_bytes']:>6} {e['spill_bytes']:>7}"
        )
    return "\n".join(lines)
