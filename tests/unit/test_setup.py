"""setup.py: what it builds where, and that a plain install needs nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import REPOSITORY


def run_setup(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py where no program is found, as on a machine without compilers."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MEGATRON_LANCE_CUDA", "CUDA_HOME", "CXX")}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**environment, "PATH": "", **variables}, capture_output=True, text=True, check=False
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a source distribution needs at least, kernels included."""
    for name in ("setup.py", "README.md"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    shutil.copytree(REPOSITORY / "kernels" / "csrc", tmp_path / "kernels" / "csrc")
    (tmp_path / "megatron_lance").mkdir()
    (tmp_path / "megatron_lance" / "__init__.py").touch()
    return tmp_path


def test_without_a_compiler_nothing_is_built(tree: Path) -> None:
    done = run_setup(tree, "build")
    assert done.returncode == 0, done.stderr
    assert "compiled ops: not built, there is no C++ compiler here" in done.stderr
    assert list(tree.rglob("*.so")) == [] and list(tree.rglob("build/lib*/megatron_lance/__init__.py"))


def test_without_the_sources_nothing_is_built(tree: Path) -> None:
    shutil.rmtree(tree / "kernels")
    done = run_setup(tree, "build")
    assert done.returncode == 0 and "compiled ops: not built, there is no kernels/csrc here" in done.stderr


def script(path: Path, *lines: str) -> str:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(("wish", "built"), [("", "for the CPU and CUDA\n"), ("0", "for the CPU\n")])
def test_cuda_is_built_where_nvcc_is(tree: Path, wish: str, built: str) -> None:
    script(tree / "nvcc")
    done = run_setup(tree, "--version", CXX="c++", PATH=str(tree), MEGATRON_LANCE_CUDA=wish)
    assert done.returncode == 0 and f"compiled ops: {built}" in done.stderr


def test_an_nvcc_that_refuses_is_said(tree: Path) -> None:
    script(tree / "nvcc", '[ "$1" = --dryrun ]')
    done = run_setup(tree, "build_ext", CXX="c++", PATH=str(tree))
    assert done.returncode == 1 and "mape_fwd.cu: nvcc refuses it, see above; take CUDA 12.8 or later" in done.stderr


@pytest.mark.parametrize(
    ("wish", "message"),
    [("yes", "MEGATRON_LANCE_CUDA=yes: must be 0 or 1"), ("1", "MEGATRON_LANCE_CUDA=1: there is no nvcc")],
)
def test_a_wish_that_cannot_be_met_is_said(tree: Path, wish: str, message: str) -> None:
    done = run_setup(tree, "--version", CXX="c++", MEGATRON_LANCE_CUDA=wish)
    assert done.returncode == 1 and message in done.stderr


def test_what_was_built_before_is_built_again(tree: Path) -> None:
    """It may be for another torch, or without CUDA."""
    log = tree / "log"
    compiler = script(tree / "compiler", f'echo "$@" >> {log}', 'while [ "$1" != -o ]; do shift; done', ': > "$2"')
    programs = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), compiler)
    calls = []
    for _ in range(2):
        done = run_setup(tree, "build_ext", MEGATRON_LANCE_CUDA="0", **programs)
        assert done.returncode == 0, done.stderr
        calls.append(log.read_text().count("mape_cpu"))
    assert calls[0] > 0 and calls[1] == 2 * calls[0]
