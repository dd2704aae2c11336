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


@pytest.mark.parametrize(
    ("wish", "message"),
    [("yes", "MEGATRON_LANCE_CUDA=yes: must be 0 or 1"), ("1", "MEGATRON_LANCE_CUDA=1: there is no nvcc")],
)
def test_a_wish_that_cannot_be_met_is_said(tree: Path, wish: str, message: str) -> None:
    done = run_setup(tree, "--version", CXX="c++", MEGATRON_LANCE_CUDA=wish)
    assert done.returncode == 1 and message in done.stderr
