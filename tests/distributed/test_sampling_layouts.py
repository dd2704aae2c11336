"""Cached sampling of every task on tp2, cp2 and pp2 against one rank that computes every token in every step.

Also prompt lists on two replicas, which share their lines out.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.distributed.launch import on_ranks, torchrun
from tests.tiny import PROMPTS, TinyRun, jpeg, mp4, write_weights


def test_cached_on_any_layout_equals_uncached_on_one_rank() -> None:
    output = on_ranks(2, "tests/distributed/run_sampling.py")
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


@pytest.fixture
def sample_line(tiny_run: TinyRun, tmp_path: Path) -> list[str]:
    """A command that samples PROMPTS, without its --out."""
    for name, medium in {"red.jpg": jpeg("red"), "blue.jpg": jpeg("blue"), "red.mp4": mp4("red")}.items():
        (tmp_path / name).write_bytes(medium)
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)), encoding="utf-8")
    weights = write_weights(tmp_path / "weights", tiny_run.load().model, {})
    line = f"tools/sample.py --config {tiny_run.config} --weights {weights} --prompts {tmp_path / 'list.jsonl'}"
    return f"{line} --size 32x32 --frames 9 --steps 2 --max-tokens 3 --batch 1 training.precision=float32".split()


def test_replicas_share_a_list_out(sample_line: list[str], tmp_path: Path) -> None:
    """Two replicas make what one makes, in its order, each half of it."""
    notes, passes = {}, {}
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        output = on_ranks(ranks, *sample_line, "--out", str(out))
        notes[ranks] = [json.loads(text) for text in (out / "samples.jsonl").read_text().splitlines()]
        passes[ranks] = f"{-(-len(PROMPTS) // ranks)}/{-(-len(PROMPTS) // ranks)}" in output
    assert notes[1] == notes[2] and len(notes[1]) == len(PROMPTS)
    assert all(passes.values()), "rounds are as many as the lines of one replica"
    for note in notes[1]:
        if note.get("file", "").endswith(".png"):
            one, two = (np.asarray(Image.open(tmp_path / f"out{ranks}" / note["file"])).astype(int) for ranks in (1, 2))
            assert np.abs(one - two).max() <= 1


def test_a_wrong_line_ends_all_ranks(sample_line: list[str], tmp_path: Path) -> None:
    (tmp_path / "red.jpg").write_bytes(b"no picture")
    output = torchrun(2, *sample_line, "--out", str(tmp_path / "out"), exit_code=1)  # torchrun's own
    for rank in (0, 1):
        assert f"sample: rank {rank}: error: --prompts {tmp_path / 'list.jsonl'} line 3: medium 1 of 1: " in output
    assert not (tmp_path / "out").exists()
