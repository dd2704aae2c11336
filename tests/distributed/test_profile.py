"""The profiler on two gloo ranks with synthetic packs, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lance.profiling.throughput import SHOWN
from megatron_lance.profiling.trace import EXPOSED
from tests.command import Commander
from tests.distributed.launch import on_ranks
from tests.shared import REPOSITORY

TOOL, TINY = "tools/profile_throughput.py", str(REPOSITORY / "examples" / "configs" / "tiny.yaml")
SMALL = ["data.seq_length=768", "training.global_batch_size=2", "model.num_layers=2", "data.max_seconds_generation=0.1"]


@pytest.mark.distributed
def test_synthetic_packs_on_two_ranks(tmp_path: Path, command: Commander) -> None:
    overrides = [*SMALL, "model.latent_position_size=64", "model.latent_position_frames=31"]
    options = ["--stage", "ct3", "--steps", "2", "--warmup", "1", "--trace", "--out", str(tmp_path)]
    degrees = "parallel.tensor_model_parallel_size=2"
    output = on_ranks(2, TOOL, "--config", TINY, *options, degrees, *overrides)
    assert "step p20" in output and "MFU -" in output
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["layout"] == {"tp": 2, "cp": 1, "pp": 1, "vpp": 1, "dp": 1}
    assert len(profile["step_seconds"]["all"]) == 2 and profile["speed"]["mfu"] is None
    rates = profile["tokens_per_second_per_device"]
    assert 0 < rates["real"] < rates["padded"]
    assert [rank["rank"] for rank in profile["ranks"]] == [0, 1]
    for rank in profile["ranks"]:
        assert set(rank["parts"]) == set(SHOWN)
        assert sum(rank["parts"].values()) == pytest.approx(rank["profiled_seconds"], rel=0.02)
        assert rank["parts"][EXPOSED] > 0  # sequence parallelism sends
        for part in ("linears und", "linears gen", "attention", "mape", "heads", "optimizer"):
            assert rank["parts"][part] > 0, part
        assert rank["memory"]["activations"] == pytest.approx(rank["memory"]["activations by formula"], rel=0.1)
        assert {"sequence parallel"} <= {transfer["name"] for transfer in rank["transfers"]}
        assert (tmp_path / f"rank{rank['rank']:05d}.json").stat().st_size > 0
    assert (tmp_path / "profile.html").read_text().count("data:image/svg") == 4
    twice = command(f"profile_throughput compare {tmp_path}/profile.json {tmp_path}/profile.json", folder=tmp_path)
    assert twice.code == 0 and twice.out.count("1.00") > 8
