"""The profiler on a real data set on one rank, and comparing and describing profiles."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import ModelConfig, RunConfig
from megatron_lance.profiling.benchmarks.attention import plan_of
from megatron_lance.profiling.criteria import memory_criterion
from megatron_lance.profiling.flops import Work, model_flops
from megatron_lance.profiling.throughput import SHOWN, Measured, Profile, compare, read_profile, summary, table
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


def test_with_a_pool_of_one_all_steps_have_the_pack_that_the_attention_benchmark_has(
    tiny_run: TinyRun, tmp_path: Path, command: Commander
) -> None:
    sizes = "data.seq_length=512 training.global_batch_size=1 training.seed=5 model.latent_position_frames=31"
    line = f"profile_throughput --config {tiny_run.config} --stage ct1 --steps 2 --pool {{}} --out {tmp_path} {sizes}"
    done = command(line.format(1), folder=tiny_run.folder)
    assert done.code == 0, done.err
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["packs"]["mask_pairs"] == plan_of("lance", 512, "ct1", 5).mask_pairs
    memory = {kind: found["max"] for kind, found in profile["memory"].items()}
    assert memory["total"] == sum(memory[kind] for kind in ("weights", "gradients", "optimizer", "activations"))
    assert memory_criterion(profile).met
    assert command(line.format(0), folder=tiny_run.folder).err.strip().endswith("the number of steps they are for")


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
    drawn = re.findall(r"base64,([^\"]+)", (tmp_path / "page.html").read_text())
    assert base64.b64decode(drawn[0]).count(b"(node 0)</text>") == MOST_RANKS


def test_a_plan_is_calibrated_from_a_profile_of_its_own_device(
    tiny_run: TinyRun, folder: Path, tmp_path: Path, command: Commander
) -> None:
    line = (
        f"plan_parallelism --config {tiny_run.config} --devices 8 --stage pt --no-scaling --out {tmp_path} --calibrate"
    )
    other = command(f"{line} {folder}/profile.json", folder=tmp_path)
    assert other.code == 2 and "the plan is for H100; name a profile of that device" in other.err
    profile = json.loads((folder / "profile.json").read_text()) | {"device_name": "NVIDIA H100 80GB HBM3"}
    (tmp_path / "h100.json").write_text(json.dumps(profile))
    done = command(f"{line} {tmp_path}/h100.json", folder=tmp_path)
    assert done.code == 0, done.err
    rates = json.loads((tmp_path / "plan.json").read_text())["rates"]
    spent = (profile["parts"][f"linears {name}"]["mean"] for name in ("und", "gen"))
    amount = profile["ranks"][0]["amounts"]["linears"]
    assert rates["source"] == "1 profiles"
    assert rates["linears"] == pytest.approx(amount * profile["profiler_slows"] / sum(spent))
    assert rates["links"]["network_bandwidth"] == 0.9 * 50e9, "one rank says nothing of links"


def rank(seconds: list[float], profiled: float) -> dict[str, Any]:
    parts = dict.fromkeys(SHOWN, profiled / len(SHOWN))
    memory = {"weights": 1.0, "activations": 1.0}
    return {"node": 0, "seconds": seconds, "profiled_seconds": profiled, "parts": parts, "memory": memory}


def test_rates_are_those_of_all_timed_steps() -> None:
    """A small step and a large one: tokens of both over seconds of both, whatever the profiled step held."""
    small, large = Work(und=100, gen=100, pairs=1000), Work(und=300, gen=500, pairs=9000)
    ranks = [rank([1.0, 4.0], 9.0), rank([2.0, 3.0], 12.0)]
    found = summary(RunConfig(), Measured(ranks, [small, large], large, 1200, 1400, 0.01, "cpu", "ct3"))
    assert found["step_seconds"]["all"] == [2.0, 4.0] and found["packs"]["tokens"] == 500
    assert found["tokens_per_second_per_device"] == {"real": 1000 / 6 / 2, "padded": 2800 / 6 / 2}
    both = model_flops(ModelConfig(), small) + model_flops(ModelConfig(), large)
    assert found["speed"]["tflops"] == pytest.approx(both / 6 / 2 / 1e12)
    assert found["speed"]["mfu"] == pytest.approx(both / 6 / 2 / 1e10)
    assert found["profiler_slows"] == pytest.approx(12 / (6 * model_flops(ModelConfig(), large) / both))


@pytest.mark.parametrize("text", ["[]", "{}", '{"step_seconds": {}}'])
def test_a_file_that_is_no_profile_is_refused_with_what_it_lacks(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="has no device_name, .*ranks.*; name a profile.json"):
        read_profile(str(tmp_path / "a.json"))
