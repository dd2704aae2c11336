"""The benchmarks of packing and prepack: what they count; not how fast anything is."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from megatron_lance.config.errors import UserError
from megatron_lance.data.synthetic import stage_samples
from megatron_lance.packing.sample import Task
from megatron_lance.packing.step_balance import Samples
from megatron_lance.profiling.benchmarks import packing, prepack, row_groups
from tests.command import Commander
from tests.tiny import write_tokenizer


def run(benchmark: ModuleType, *given: str) -> tuple[dict[str, Any], str]:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    result = benchmark.run(parser.parse_args(given))
    return result, benchmark.table(result)


def test_the_greedy_packer_keeps_what_does_not_fit_for_later() -> None:
    """One rank, samples of 6 and 4 in packs of 10: a 6 waits behind another 6 or two 4s, and begins a later pack."""
    length = np.array([6, 4] * 200)
    steps = list(packing._greedy(Samples(length, length, length * 0), 1, 1, capacity=10, least=10, seed=1))
    packs = [pack for step in steps for pack in step]
    assert all(sum(length[i] for i in pack) <= 10 for pack in packs)
    inside = [i for pack in packs for i in pack]
    assert len(set(inside)) == len(inside) >= 400 - packing.BUFFER - 2
    totals = {int(sum(length[i] for i in pack)) for pack in packs}
    assert {8, 10} <= totals <= {6, 8, 10}, "a 6 is alone where the buffer is full of sixes"


def test_figures_of_packing() -> None:
    result, text = run(packing, *"--stage pt --dp 4 --micro-batches 2 --samples 1500 --bands 1 2 --window 64".split())
    alike, banded = result["planned"]
    assert alike["fill"] > 0.99 and alike["fill"] > result["greedy"]["fill"]
    assert 1 <= alike["max_over_mean"]["mean"] <= alike["max_over_mean"]["worst"] < 1.2
    assert alike["max_over_mean"]["mean"] < result["greedy"]["max_over_mean"]["mean"]
    assert banded["deviation_of_step_cost"] > 2 * alike["deviation_of_step_cost"]
    assert set(alike["share_deviation_over_random"]) == {"t2i", "t2v", "i2t", "v2t"}
    assert alike["worst_share_deviation"] == max(alike["share_deviation_over_random"].values())
    assert text.count("\n") == 4 and "greedy" in text


def test_the_result_alone_as_json(command: Commander, tmp_path: Path) -> None:
    done = command("bench packing --stage pt --dp 2 --micro-batches 2 --samples 800 --json", folder=tmp_path)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (result["stage"], result["dp"], result["micro_batches"]) == ("pt", 2, 2) and result["command"].endswith(
        "json"
    )
    assert not list(tmp_path.iterdir())


def test_a_node_reads_a_row_group_again_only_when_it_left_its_cache() -> None:
    cache = row_groups.NodeCache(2)
    for group in (1, 2, 1, 3, 1, 2):  # 3 pushes out 2
        cache.use((0, group))
    assert cache.read == 4


def test_media_count_once_whatever_encoder_sees_them() -> None:
    by_task = {sample.task: sample for sample in islice(stage_samples("ct3", 0), 200)}
    second = row_groups.CLIP_SECOND
    assert row_groups.media_bytes(by_task[Task.T2I]) == row_groups.media_bytes(by_task[Task.I2T]) == row_groups.PICTURE
    assert row_groups.media_bytes(by_task[Task.I_EDIT]) == 2 * row_groups.PICTURE
    for task, clips in ((Task.T2V, 1), (Task.V_EDIT, 2), (Task.V2T, 1)):
        assert clips * second / 2 <= row_groups.media_bytes(by_task[task]) <= clips * 6 * second, task


def test_figures_of_row_groups() -> None:
    given = "--stage ct3 --dp 4 --micro-batches 2 --samples 800 --nodes 1 4 --mixed 1 64 --group-mb 16 --cache-gb 64"
    result, text = run(row_groups, *given.split())
    found = {(one["mixing_row_groups"], one["nodes"]): one["bytes_read_per_byte_used"] for one in result["curve"]}
    assert 1 <= found[1, 1] < found[1, 4] and found[1, 1] < found[64, 1] < found[64, 4]
    assert text.count("\n") == 6 and "read / used" in text


def test_figures_of_prepack(tmp_path: Path) -> None:
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer"))
    result, text = run(prepack, *f"--stage ct3 --rows 60 --workers 1 --tokenizer {tokenizer}".split())
    assert result["counts"]["unusable"] == 0 and result["counts"]["samples"] >= 60
    assert all(result[name]["seconds"] > 0 for name in ("first", "another_budget_and_resolution", "one_more_shard"))
    assert result["bytes_per_row"]["index"] > 50 and "projected" in text
    result, text = run(prepack, *f"--stage ct3 --rows 60 --workers 1 --tokenizer {tokenizer} --first-only".split())
    assert result["first"]["seconds"] > 0 and "one_more_shard" not in result and "projected" not in text


def test_a_failing_prepack_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tools/prepack.py ended with exit code 2"):
        prepack._timed(tmp_path, 1)
