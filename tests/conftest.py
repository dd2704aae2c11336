"""Fixtures for all tests; what only some need is imported when asked for: GPU machines lack media libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.command import Commander
    from tests.tiny import TinyRun


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A tiny data set, tokenizer, configuration and pack index, made once and not to be changed."""
    from tests.tiny import make_tiny_run

    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commander:
    """Runs command lines in this process."""
    from tests.command import Commander

    return Commander(monkeypatch, capsys)
