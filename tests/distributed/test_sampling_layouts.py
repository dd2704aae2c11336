"""Cached sampling of every task on tp2, cp2 and pp2 against one rank that computes every token in every step."""

from __future__ import annotations

import json

from tests.distributed.launch import torchrun


def test_cached_on_any_layout_equals_uncached_on_one_rank() -> None:
    output = torchrun(2, "tests/distributed/run_sampling.py")
    (line,) = [line for line in output.splitlines() if line.startswith("RESULTS")]
    results = json.loads(line.removeprefix("RESULTS"))
    tasks = {"v_edit", "t2i", "t2v", "s2i", "ff2v", "flf2v", "i_edit", "s2v"}
    assert set(results["layouts"]) == {"one", "tp2", "cp2", "pp2", "pp2-vpp2"}
    for name, found in results["layouts"].items():
        assert set(found["latents"]) == tasks
        assert max(found["latents"].values()) <= 1e-5, (name, found["latents"])
        assert found["answers"] == results["answers"], name
    answers = results["answers"]
    assert set(answers) == {f"{q} {how}" for q in ("i2t", "t2t", "v2t") for how in ("greedy", "top-p")}
    assert any(len(set(ids)) > 1 for ids in answers.values()) and answers["t2t greedy"] != answers["t2t top-p"]
