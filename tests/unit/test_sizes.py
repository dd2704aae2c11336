"""Sizes and frame indices: the golden values exactly, and the properties every size must have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lance.data.sizes import (
    ASPECT_RATIOS,
    bucket_size,
    crop_window,
    has_positions,
    sample_frames,
    vae_grid,
    vae_size,
    vit_grid,
    vit_size,
)
from tests.shared import shared_path

SIDES = st.integers(1, 5000)
RESOLUTIONS = st.sampled_from([64, 224, 256, 448, 476, 480, 512, 616, 640, 672, 768])


def golden(name: str) -> Any:
    return json.loads(shared_path("golden", name).read_text())


def test_the_last_cell_decides_whether_a_grid_has_positions() -> None:
    assert has_positions((2, 4, 4), 2, 4) and has_positions((1, 8, 4), 2, 4)  # sides may be longer than the table's
    assert not has_positions((2, 4, 5), 2, 4) and not has_positions((3, 1, 1), 2, 4)


def test_buckets_are_the_golden_ones() -> None:
    for resolution, buckets in golden("transforms.json")["buckets"].items():
        for bucket in buckets:
            height, width = bucket["bucket_hw"]
            assert bucket_size(width, height, int(resolution)) == (height, width)
            assert vae_size(width, height, int(resolution)) == tuple(bucket["after_crop16_hw"])
            assert vit_size(width, height, int(resolution)) == tuple(bucket["after_crop28_hw"])


def test_golden_pictures_get_the_golden_sizes() -> None:
    shapes = golden("transforms.json")["shapes"]
    assert shapes
    for shape in shapes:
        height, width = shape["in_hw"]
        size = {"vae": vae_size, "vit": vit_size}[shape["tag"]](width, height, shape["resolution"])
        assert size == tuple(shape["out_cthw"][2:])


@pytest.mark.parametrize(
    ("size", "resolution", "wide"),
    [
        (vae_size, 768, [(496, 1152), (576, 1024), (672, 896), (768, 768)]),
        (vae_size, 640, [(416, 976), (480, 848), (560, 752), (640, 640)]),
        (vit_size, 672, [(420, 1008), (504, 896), (560, 756), (672, 672)]),
        (vit_size, 616, [(392, 924), (448, 812), (504, 700), (588, 588)]),
    ],
)
def test_the_table_of_the_specification(size: Any, resolution: int, wide: list[tuple[int, int]]) -> None:
    for (ratio_w, ratio_h), expected in zip(ASPECT_RATIOS, wide, strict=False):
        assert size(100 * ratio_w, 100 * ratio_h, resolution) == expected
    for ratio_w, ratio_h in ASPECT_RATIOS[4:]:  # portrait: the transposes
        assert size(100 * ratio_w, 100 * ratio_h, resolution) == size(100 * ratio_h, 100 * ratio_w, resolution)[::-1]


@given(SIDES, SIDES, RESOLUTIONS)
def test_the_crop_window_is_centred_inside_and_has_the_ratio(width: int, height: int, resolution: int) -> None:
    bucket = bucket_size(width, height, resolution)
    top, left, crop_h, crop_w = crop_window(width, height, bucket)
    assert 0 <= top and 1 <= crop_h <= height and 0 <= left and 1 <= crop_w <= width
    assert 0 <= (height - crop_h) - 2 * top <= 1 and 0 <= (width - crop_w) - 2 * left <= 1
    ratio = bucket[1] / bucket[0]
    assert abs(crop_w - crop_h * ratio) <= 1 + ratio


@pytest.mark.parametrize(
    ("width", "height", "bucket", "window"),
    [
        (160, 90, (64, 112), (0, 1, 90, 158)),  # too wide: 157.5 columns, rounded to even
        (100, 120, (64, 48), (0, 5, 120, 90)),
        (37, 50, (64, 48), (0, 0, 50, 37)),  # off by less than a pixel: kept whole
    ],
)
def test_known_crop_windows(
    width: int, height: int, bucket: tuple[int, int], window: tuple[int, int, int, int]
) -> None:
    assert crop_window(width, height, bucket) == window


def test_frame_indices_are_the_golden_ones() -> None:
    cases = golden("frame_sampler.json")
    assert len(cases) == 120
    for case in cases:
        indices = sample_frames(case["total"], case["fps"], 12.0, case["max_duration"])
        assert list(indices) == case["indices"], case
        assert vae_grid(len(indices), (16, 16))[0] == case["info"]["clip_n_latent_frames"][0]


@given(st.integers(1, 2000), st.floats(0.6, 120), st.sampled_from([2.0, 6.0]), st.sampled_from(["release", "trim"]))
def test_sampled_frames_are_4k_plus_1_in_range_and_ascending(n: int, fps: float, seconds: float, mode: str) -> None:
    try:
        indices = sample_frames(n, fps, 12.0, seconds, mode)
    except ValueError:
        assert n / round(fps) * 12 <= 0.5
        return
    assert len(indices) % 4 == 1 and len(indices) <= 12 * seconds + 1
    assert list(indices) == sorted(indices) and indices[0] == 0
    last = n if mode == "release" else min(n, max(1, round(seconds * round(fps))))
    assert indices[-1] == (last - 1 if len(indices) > 1 else 0)


def test_trim_takes_the_beginning_and_release_the_whole_clip() -> None:
    assert sample_frames(300, 24, 12, 2)[-1] == 299
    assert sample_frames(300, 24, 12, 2, "trim") == sample_frames(48, 24, 12, 2)
    assert sample_frames(40, 24, 12, 2, "trim") == sample_frames(40, 24, 12, 2)


def test_the_frame_rate_and_the_count_are_rounded_half_to_even() -> None:
    assert sample_frames(7, 8, 12, 2) == (0, 0, 1, 2, 3, 3, 4, 5, 6)  # 10.5 frames: 10, not 11; then 9
    assert sample_frames(48, 23.976, 12, 6) == sample_frames(48, 24, 12, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 24.0, 12.0, 6.0), "too short"),
        ((0, 24.0, 12.0, 6.0), "too short"),
        ((48, 0.0, 12.0, 6.0), "average_fps 0.0"),
        ((48, 0.4, 12.0, 6.0), "average_fps 0.4"),
        ((48, float("nan"), 12.0, 6.0), "average_fps nan"),
        ((48, 24.0, 0.0, 6.0), "target_fps 0.0"),
        ((48, 24.0, 12.0, -1.0), "max_seconds -1.0"),
        ((48, 24.0, 12.0, 6.0, "middle"), "'middle'"),
    ],
)
def test_frames_that_cannot_be_sampled_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_frames(*arguments)


def test_grids_count_cells() -> None:
    assert vae_grid(1, (480, 848)) == (1, 30, 53)
    assert vae_grid(69, (480, 848)) == (18, 30, 53)
    assert vit_grid(1, (448, 812)) == (1, 16, 29)
    assert vit_grid(21, (448, 812)) == (11, 16, 29)
    assert vit_grid(22, (448, 812)) == (11, 16, 29)


@pytest.mark.parametrize(
    ("grid", "frames", "size", "message"),
    [
        (vae_grid, 4, (32, 32), "4k\\+1"),
        (vae_grid, 1, (32, 40), "multiple of 16"),
        (vae_grid, 0, (32, 32), "at least one frame"),
        (vit_grid, 1, (56, 32), "multiple of 28"),
        (vit_grid, 1, (0, 28), "multiple of 28"),
    ],
)
def test_impossible_grids_are_refused(grid: Any, frames: int, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(frames, size)


def test_impossible_pictures_and_resolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="picture of 0x10"):
        bucket_size(0, 10, 640)
    with pytest.raises(ValueError, match="resolution 16"):
        bucket_size(10, 10, 16)
    with pytest.raises(ValueError, match="smaller than one 28-pixel cell"):
        vit_size(2100, 900, 32)


@pytest.mark.parametrize(
    ("size", "resolution", "sides", "wide", "want"),
    [
        (vae_size, 640, (480, 848), (21, 9), (480, 848)),  # 416x976 is too low and too long
        (vae_size, 640, (480, 848), (16, 9), (480, 848)),
        (vae_size, 640, (), (21, 9), (416, 976)),
        (vae_size, 256, (192, 848), (21, 9), (192, 336)),
        (vit_size, 616, (462, 826), (21, 9), (448, 812)),  # bucket 464x832, in whole patches 462x826
        (vit_size, 616, (463, 826), (16, 9), (504, 700)),
        (vit_size, 616, (462, 825), (16, 9), (504, 700)),
        (vit_size, 224, (168, 826), (16, 9), (168, 252)),
    ],
)
def test_sides_leave_out_buckets(
    size: Callable[..., tuple[int, int]],
    resolution: int,
    sides: tuple[int, ...],
    wide: tuple[int, int],
    want: tuple[int, int],
) -> None:
    width, height = 100 * wide[0], 100 * wide[1]
    assert size(width, height, resolution, sides) == want
    if wide != (21, 9):
        assert size(height, width, resolution, sides) == want[::-1]


def test_sides_that_allow_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sides \[600, 620\]: allow none of the sizes 416x976, .* of resolution 640"):
        vae_size(1, 1, 640, (600, 620))
