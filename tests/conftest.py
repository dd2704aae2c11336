"""Fixtures for all tests."""

from __future__ import annotations

import pytest

from tests.command import Commander
from tests.tiny import TinyRun, make_tiny_run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A tiny data set, tokenizer, configuration and pack index, made once and not to be changed."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commander:
    """Runs command lines in this process."""
    return Commander(monkeypatch, capsys)
