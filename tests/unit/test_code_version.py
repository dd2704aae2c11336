"""What says which code ran."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from megatron_lance.config.code_version import UNKNOWN, code_version, commit

ROOT = Path(__file__).resolve().parents[2]


def version() -> str:
    """Of the package, which need not be installed."""
    try:
        return metadata.version("megatron-lance")
    except metadata.PackageNotFoundError:
        return "not installed"


def test_a_checkout_names_its_commit() -> None:
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip("not in a git checkout")
    assert head.stdout.startswith(commit().removesuffix("-dirty"))
    assert code_version() == f"{version()}, commit {commit()}"


def test_without_git_the_version_is_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    commit.cache_clear()
    try:
        assert commit() == UNKNOWN and code_version() == version()
    finally:
        commit.cache_clear()
