"""The profiler on a real data set on one rank, and comparing and describing profiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lance.profiling.throughput import Profile, compare, table
from megatron_lance.profiling.throughput_page import MOST_RANKS, write_profile_page
from tests.command import Commander
from tests.tiny import TinyRun


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


def test_the_runs_own_data(tiny_run: TinyRun, folder: Path, command: Commander) -> None:
    line = (
        f"profile_throughput --config {tiny_run.config} --steps 2 --warmup 1 --out {folder} profiling.peak_tflops=0.01"
    )
    done = command(line, folder=tiny_run.folder)
    assert done.code == 0, done.err
    profile = json.loads((folder / "profile.json").read_text())
    assert profile["parts"]["encoders"]["mean"] > 0 and profile["parts"]["data wait"]["mean"] > 0
    speed = profile["speed"]
    assert speed["mfu"] == pytest.approx(speed["tflops"] / 0.01) and "MFU" in done.out
    assert profile["packs"]["tokens"] <= profile["packs"]["capacity"] <= profile["packs"]["padded"]
    assert not list(folder.glob("rank*.json")), "without --trace none is kept"


def test_profiles_compare_and_describe_themselves(folder: Path, tmp_path: Path) -> None:
    profile: Profile = json.loads((folder / "profile.json").read_text())
    slower: Profile = json.loads((folder / "profile.json").read_text())
    slower["step_seconds"]["p50"] *= 2
    slower["recompute"] = "full"
    told = compare(profile, slower)
    assert any(line.startswith("step p50") and line.endswith("2.00") for line in told.splitlines())
    assert f"recompute: A {profile['recompute']}, B full" in told
    assert table(profile).count("\n") > 15
    many = {**profile, "ranks": [{**profile["ranks"][0], "rank": i} for i in range(200)]}
    write_profile_page(many, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("(node 0)</text>") == MOST_RANKS
