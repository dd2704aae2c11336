"""The benchmarks of the data path: what they count; not how fast anything is."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import ModuleType
from typing import Any

import pytest

from megatron_lance.config.schema import DataConfig
from megatron_lance.data.decode import DecodeRequest, MediaReader, ReadMedia
from megatron_lance.profiling.benchmarks import data_memory, data_path, row_group_reads, row_groups
from megatron_lance.profiling.benchmarks.damaged_files import SIDE, clip, damaged_files, picture
from tests.tiny import TinyRun


def run(benchmark: ModuleType, tokenizer: Path, *given: str) -> tuple[dict[str, Any], str]:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    result = benchmark.run(parser.parse_args([*given, "--tokenizer", str(tokenizer)]))
    return result, benchmark.table(result)


def test_bare_decoding_makes_the_wanted_frames() -> None:
    request = DecodeRequest(clip(13), (0, 4, 12), (64, 64), (64, 64), "vae")
    assert [frame.shape for frame in data_path.bare_decode(request)] == [(SIDE, SIDE, 3)] * 3


def test_the_bare_way_gives_nearly_our_pixels() -> None:
    request = DecodeRequest(clip(13, 128, 64), (0, 4, 12), (48, 64), (32, 64), "vae")
    (ours,) = MediaReader("host", 1)([request])
    assert isinstance(ours, ReadMedia)
    bare = data_path.bare_pixels(request)
    assert bare.shape == ours.data.shape and (bare.float() - ours.data).abs().mean() < 2


def test_figures_of_the_data_path(tiny_run: TinyRun) -> None:
    given = "--clips 2 --height 96 --repeats 2 --workers 1".split()
    result, text = run(data_path, tiny_run.folder / "tokenizer", *given)
    assert set(result["cpu_ms_per_clip"]) == {"bare_frames", "frames", "bare_pixels", "pixels"}
    for figures in (*result["cpu_ms_per_clip"].values(), *result["seconds_per_pass"].values()):
        assert figures["p20"] <= figures["p50"] <= figures["p80"] and figures["p80"] > 0
    assert 0 < result["waiting_at_half_peak"]["share"] < 1
    assert "waiting of a consumer" in text


def test_figures_of_memory(tiny_run: TinyRun) -> None:
    result, text = run(data_memory, tiny_run.folder / "tokenizer", "--packs", "8", "--workers", "1")
    assert [point["packs"] for point in result["curve_mib"]] == list(range(1, 9))
    assert all(point["process"] > 0 for point in result["curve_mib"]) and result["curve_mib"][-1]["workers"] > 0
    assert "MiB per 1000 packs" in text


def test_flatness_is_of_the_last_and_the_second_quarter() -> None:
    curve = [{"packs": 100 * (i + 1), "process": 50.0 + i, "workers": 50.0} for i in range(8)]
    found = data_memory._flatness(curve)
    assert found["last_over_second_quarter"] == pytest.approx(106.5 / 102.5)
    assert found["mib_per_1000_packs"] == pytest.approx(1000 * 4 / 400)


def test_a_cache_makes_processes_read_a_row_group_once(tiny_run: TinyRun, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    row_group_reads.add_arguments(parser)
    given = "--ranks 2 --workers 1 --packs 2 --total-gb 0.04 --group-mb 64 --cache-gb 1".split()
    args = parser.parse_args([*given, "--tokenizer", str(tiny_run.folder / "tokenizer")])
    config, index = row_group_reads.plan(tmp_path, args)
    assert index.counts["unusable"] == 0 and len(index) >= 2

    def read(data: DataConfig) -> list[dict[str, Any]]:
        readings = [row_group_reads.Reading(data, args.packs, 2, rank, 1, 0, 1) for rank in range(2)]
        return [row_group_reads.read_steps(reading, Barrier(1)) for reading in readings]

    without, cached = read(config), read(replace(config, row_group_cache=str(tmp_path / "cache")))
    assert row_group_reads._is_same(without, cached) and without[0]["digests"] != without[1]["digests"]
    plain, shared = (row_group_reads._figures(found, 1) for found in (without, cached))
    assert plain["bytes_used"] == shared["bytes_used"] > 1e7
    in_cache = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())
    assert in_cache < shared["bytes_read"] < 1.05 * in_cache + 1e6 and shared["bytes_read"] < plain["bytes_read"]
    assert 0 < shared["peak_anonymous_mib"] < shared["peak_mib"]


def test_bytes_per_second_of_nodes_that_read_row_groups() -> None:
    given = "--samples 900 --nodes 1 3 --mixed 1 --group-mb 8 --cache-gb 8 --step-seconds 2".split()
    parser = argparse.ArgumentParser()
    row_groups.add_arguments(parser)
    result = row_groups.run(parser.parse_args(given))
    assert result["used_mb_per_second"] == pytest.approx(result["bytes_used_per_step"] / 2e6)
    for one in result["curve"]:
        rate = one["bytes_read_per_byte_used"] * result["used_mb_per_second"] / one["nodes"]
        assert one["node_mb_per_second"] == pytest.approx(rate)
    assert "MB/s a node" in row_groups.table(result)


def test_damaged_files_are_many_distinct_and_not_the_good_ones() -> None:
    good = clip()
    files = damaged_files({"clip": good}, {"jpeg": picture("JPEG")})
    assert len({file.name for file in files}) == len(files) > 90
    assert sum(file.data == good for file in files) == 1  # a good clip where a picture should be
    again = damaged_files({"clip": good}, {"jpeg": picture("JPEG")})
    assert [file for file in again if file.good] == [file for file in files if file.good]
