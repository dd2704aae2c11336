"""Damaged pictures and clips on two ranks: each named or decoded, no crash, no hang, all ranks in step."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from tests.distributed.launch import on_ranks
from tests.shared import REPOSITORY
from tests.tiny import TinyRun

pytestmark = pytest.mark.distributed

NEVER_USED = {"empty", "no video stream", "begin lost", "all zeros", "huge header size", "changed resolution"}
"""Damages that planning finds or that no frame can be decoded of."""


def test_every_damaged_file_has_an_outcome(tiny_run: TinyRun, tmp_path: Path) -> None:
    bench = [str(REPOSITORY / "tools" / "bench.py"), "damaged-media", "--json", str(tmp_path / "result.json")]
    on_ranks(2, *bench, "--tokenizer", str(tiny_run.folder / "tokenizer"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ranks"] == 2 and result["files"] == len(result["outcomes"]) > 100
    assert all(result["ranks_agree"].values())
    assert set(result["worker_restarts"].values()) == {0}
    assert max(result["slowest_step_seconds"].values()) < 30  # what data.media_seconds allows
    planned, later = defaultdict(set), defaultdict(set)
    for one in result["outcomes"]:
        planned[one["damage"]].add(one["planned"])
        later[one["damage"]].add(one["broken after planning"])
    decoded = "decoded to the good file's pixels", "decoded to other pixels"
    for damage in NEVER_USED:
        assert "decoded" not in planned[damage] and not later[damage].intersection(decoded), damage
    assert later["rotated"] == {decoded[0]}  # pictures are taken as stored
    assert planned["other mode"] == planned["variable rate"] == planned["1x1"] == {"decoded"}
    assert later["empty"] == {"no bytes: the media column is empty"}
    assert any("truncated" in cause for cause in later["truncated"])
