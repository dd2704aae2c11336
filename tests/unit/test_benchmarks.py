"""Benchmarks run, on little, and their results and tables hold what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lance.config.schema import ParallelConfig
from megatron_lance.profiling.benchmarks import long_pack
from tests.command import Commander
from tests.unit.tiny_model import mixed_pack, one_rank


def test_cp_balance(command: Commander, tmp_path: Path) -> None:
    done = command("bench cp-balance --packs 3 --cp 2 16 --json result.json", folder=tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["packs"] == 3 and set(result["by_cp"]) == {"2", "16"}
    assert {"command", "commit", "date", "device"} <= set(result)
    for found in result["by_cp"].values():
        assert 1.0 <= found["tiles"]["mean"] <= found["tiles"]["worst"] < found["zigzag_tiles"]["worst"]
        assert found["rows"]["worst"] < 1.01 and 0 <= found["padding"]["mean"] < 0.05
        assert found["slices"]["mean"] >= 1 and found["solver_ms"]["p50"] > 0
        tp1, tp4 = found["megabytes_per_layer"]["tp1"], found["megabytes_per_layer"]["tp4"]
        assert tp1["ring"] > tp1["gathered_keys_values"] > tp4["gathered_keys_values"] > 0
        assert tp1["qkv_over_tp"] == 0 < tp4["qkv_over_tp"]
    heads = [found["megabytes_per_layer"]["tp1"]["head_splitting"] for found in result["by_cp"].values()]
    assert heads[0] and heads[1] is None, "two key/value heads are split over two ranks at most"
    assert "zigzag" in done.out and done.out.count("\n") == 4


def test_long_pack_on_a_short_one() -> None:
    with one_rank() as groups:
        result = long_pack.on_ranks(mixed_pack(), ParallelConfig(region_alignment=8), groups)
    assert result["tokens"] == mixed_pack().length and len(result["samples"]) == 4
    assert {"attention plan", "layout with deal", "positions", "dispatch", "forward", "backward"} <= set(
        result["seconds"]
    )
    assert result["mask_pairs_max_over_mean"] == pytest.approx(1.0)
    assert result["collective_bytes"] == {"counted": 0, "formula": 0.0}
    assert "peak memory of a rank" in long_pack.table(result)


def test_sampling_with_and_without_the_cache(command: Commander, tmp_path: Path) -> None:
    sizes = "--layers 1 --hidden 256 --side 64 --frames 5 --steps 2 --repeats 2"
    done = command(f"bench sampling {sizes} --json result.json", folder=tmp_path)
    assert done.code == 0, done.err
    cases = json.loads((tmp_path / "result.json").read_text())["cases"]
    assert set(cases) == {"edit of a picture", "clip", "edit of a clip"}
    for found in cases.values():
        assert found["difference"] <= 1e-5
        fast, slow = (found[f"{way}_seconds"]["all"] for way in ("cached", "uncached"))
        assert len(fast) == len(slow) == 2
        assert found["ratio"]["p50"] == pytest.approx(sum(b / a for a, b in zip(fast, slow, strict=True)) / 2)
        assert found["ratio"]["p20"] <= found["ratio"]["p50"] <= found["ratio"]["p80"]
        assert 0 < found["cached_share_in_layers"] < 1 and 0 < found["uncached_share_in_layers"] < 1
    assert (cases["clip"]["target_tokens"], cases["edit of a clip"]["target_tokens"]) == (2 * 16 + 2, 2 * 16 + 2)
    assert cases["clip"]["context_tokens"] < cases["edit of a clip"]["context_tokens"]
    assert "ratio" in done.out and done.out.count("\n") == 5
