"""Two kills of the torture, inside saves in the background."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import REPOSITORY
from tests.torture.torture import Kill

pytestmark = pytest.mark.distributed


def test_kills_inside_saves_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.torture.torture", "--kills", "2", "--steps", "8"]
    options = ["--events", "save", "--json", str(tmp_path / "result.json")]
    done = subprocess.run([*command, *options], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert (result["kills"], result["identical"]) == (2, True)


def test_moments_follow_from_the_address() -> None:
    kills = [Kill.at(1, number) for number in range(20)]
    assert kills == [Kill.at(1, number) for number in range(20)] != [Kill.at(2, number) for number in range(20)]
    assert {kill.event for kill in kills} == {"start", "step", "save", "publication"}
