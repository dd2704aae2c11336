"""The benchmarks of the data path: what they count; not how fast anything is."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_lance.data.decode import DecodeRequest, MediaReader, ReadMedia
from megatron_lance.profiling.benchmarks import data_memory, data_path
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


def test_damaged_files_are_many_distinct_and_not_the_good_ones() -> None:
    good = clip()
    files = damaged_files({"clip": good}, {"jpeg": picture("JPEG")})
    assert len({file.name for file in files}) == len(files) > 90
    assert sum(file.data == good for file in files) == 1  # a good clip where a picture should be
    again = damaged_files({"clip": good}, {"jpeg": picture("JPEG")})
    assert [file for file in again if file.good] == [file for file in files if file.good]
