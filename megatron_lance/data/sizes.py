"""Sizes: which pixels and which frames of a picture or clip are used (spec/data.md section 3).

Station: record -> probe -> [sizes] -> segments and decode requests.  In: width and height in pixels, frame count,
frame rate.  Out: bucket, crop window, final size, frame indices and token grids, all known before a pixel is decoded.
Sizes are (H, W); grids are (T, H, W).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

ASPECT_RATIOS = ((21, 9), (16, 9), (4, 3), (1, 1), (3, 4), (9, 16))
"""The buckets' nominal ratios, width : height."""
BUCKET_STRIDE = 16
"""Pixels; bucket sides are multiples of it."""
VAE_STRIDE = 16
"""Pixels per latent cell along height and width."""
VAE_FRAMES = 4
"""Frames per latent frame; the first latent frame holds one frame."""
VIT_PATCH = 14
"""Pixels per ViT patch along height and width; the recipes' bounds of ViT sizes are multiples of it."""
VIT_STRIDE = 28
"""Pixels per ViT token along height and width: patches, merged 2x2."""
VIT_FRAMES = 2
"""Frames per ViT patch."""


Sides = tuple[int, ...]
"""(least short side, greatest long side) in pixels that a size may have; empty: any."""


def _round_to_stride(length: float) -> int:
    return round(length / BUCKET_STRIDE) * BUCKET_STRIDE


def _bucket(ratio: float, area: int) -> tuple[int, int]:
    """The (H, W) of one nominal ratio, width / height: the closer of rounding the width or the height first."""
    width = _round_to_stride(math.sqrt(area * ratio))
    height = _round_to_stride(math.sqrt(area / ratio))
    width_first = (_round_to_stride(width / ratio), width)
    height_first = (height, _round_to_stride(height * ratio))
    return min(width_first, height_first, key=lambda b: (abs(b[1] / b[0] - ratio), abs(b[0] * b[1] - area)))


@lru_cache(maxsize=64)
def _buckets(resolution: int) -> tuple[tuple[int, int], ...]:
    """The (H, W) buckets of one resolution, in the order of ASPECT_RATIOS."""
    if resolution < 2 * BUCKET_STRIDE:
        raise ValueError(f"resolution {resolution}: must be at least {2 * BUCKET_STRIDE} pixels; raise the resolution")
    return tuple(_bucket(w / h, resolution * resolution) for w, h in ASPECT_RATIOS)


@lru_cache(maxsize=64)
def _allowed(resolution: int, patch: int, sides: Sides) -> tuple[tuple[int, int], ...]:
    """The buckets that keep the bounds in whole patches."""
    if not sides:
        return _buckets(resolution)
    crops = [(bucket, _crop_to_stride(bucket, patch, resolution)) for bucket in _buckets(resolution)]
    found = tuple(bucket for bucket, crop in crops if min(crop) >= sides[0] and max(crop) <= sides[1])
    if not found:
        sizes = ", ".join(f"{crop[0]}x{crop[1]}" for _, crop in crops)
        raise ValueError(f"sides {list(sides)}: allow none of the sizes {sizes} of resolution {resolution}; widen them")
    return found


def bucket_size(
    width: int, height: int, resolution: int, patch: int = BUCKET_STRIDE, sides: Sides = ()
) -> tuple[int, int]:
    """(H, W) in pixels of the bucket whose ratio is closest to the picture's (spec/data.md section 3).

    Args:
        width: of the picture, pixels.
        height: of the picture, pixels.
        resolution: pixels; the bucket's area is close to its square.
        patch: pixels; the bounds are of the bucket in whole patches.
        sides: those bounds; a picture of a ratio that they exclude goes to the closest other one.

    Raises:
        ValueError: if a side is not positive, the resolution is too small for a bucket or the bounds exclude all.
    """
    if width < 1 or height < 1:
        raise ValueError(f"picture of {width}x{height}: both sides must be at least 1 pixel; drop the row")
    return min(_allowed(resolution, patch, sides), key=lambda b: abs(width / height - b[1] / b[0]))


def _crop_to_stride(size: tuple[int, int], stride: int, resolution: int) -> tuple[int, int]:
    height, width = (side // stride * stride for side in size)
    if not height or not width:
        raise ValueError(
            f"resolution {resolution}: its bucket {size[0]}x{size[1]} is smaller than one {stride}-pixel cell; "
            "raise the resolution"
        )
    return height, width


def vae_size(width: int, height: int, resolution: int, sides: Sides = ()) -> tuple[int, int]:
    """(H, W) in pixels of the VAE input: the bucket, centre-cropped to a multiple of 16. Raises as bucket_size."""
    return _crop_to_stride(bucket_size(width, height, resolution, VAE_STRIDE, sides), VAE_STRIDE, resolution)


def vit_size(width: int, height: int, resolution: int, sides: Sides = ()) -> tuple[int, int]:
    """(H, W) in pixels of the ViT input: the bucket, centre-cropped to a multiple of 28. Raises as bucket_size."""
    return _crop_to_stride(bucket_size(width, height, resolution, VIT_PATCH, sides), VIT_STRIDE, resolution)


def crop_window(width: int, height: int, bucket: tuple[int, int]) -> tuple[int, int, int, int]:
    """The centred window of a picture that has the bucket's ratio; it is what gets resized to the bucket.

    The window of the picture's own area is taken where it fits after rounding (so a picture off by less than a pixel
    is not cropped), else the largest one.  This is torchvision's RandomResizedCrop with scale 1, which made the
    goldens; where that would draw an offset this centres.

    Args:
        width: of the picture, pixels.
        height: of the picture, pixels.
        bucket: (H, W), pixels.

    Returns:
        (top, left, height, width), pixels.
    """
    ratio = bucket[1] / bucket[0]
    crop_w, crop_h = round(math.sqrt(width * height * ratio)), round(math.sqrt(width * height / ratio))
    if crop_w > width or crop_h > height:
        if width / height < ratio:
            crop_w, crop_h = width, max(1, round(width / ratio))
        else:
            crop_w, crop_h = max(1, round(height * ratio)), height
    return (height - crop_h) // 2, (width - crop_w) // 2, crop_h, crop_w


def sample_frames(
    n_frames: int, average_fps: float, target_fps: float, max_seconds: float, mode: str = "release"
) -> tuple[int, ...]:
    """Which frames of a clip are used: 4k+1 indices, the first and last of the range included.

    Args:
        n_frames: displayable frames of the clip.
        average_fps: of the clip, frames per second; rounded to a whole number.
        target_fps: frames per second.
        max_seconds: seconds; a longer clip is compressed in time or trimmed.
        mode: release (indices over the whole clip) | trim (over its first max_seconds).

    Returns:
        Indices in [0, n_frames), ascending; an index repeats where the clip is slower than target_fps.

    Raises:
        ValueError: if the clip is too short for one frame, or an argument is out of its range.
    """
    if mode not in ("release", "trim"):
        raise ValueError(f"frame_sampling {mode!r}: must be release or trim")
    if not target_fps > 0 or not max_seconds > 0:
        raise ValueError(f"target_fps {target_fps} and max_seconds {max_seconds}: both must be positive")
    if not 0 < average_fps < math.inf or round(average_fps) == 0:
        raise ValueError(f"average_fps {average_fps}: must round to at least 1 frame per second; drop the row")
    fps = round(average_fps)
    count = round(min(n_frames / fps, max_seconds) * target_fps)
    if count < 1:
        raise ValueError(
            f"clip of {n_frames} frame(s) at {fps} fps: too short for one frame at {target_fps} fps; drop the row"
        )
    count = 4 * (count // 4) + 1 if count % 4 else count - 3
    if mode == "trim":
        n_frames = min(n_frames, max(1, round(max_seconds * fps)))
    return tuple(np.linspace(0, n_frames - 1, count).astype(int).tolist())


def _check_grid(frames: int, size: tuple[int, int], stride: int) -> None:
    if frames < 1 or min(size) < stride or size[0] % stride or size[1] % stride:
        raise ValueError(
            f"{frames} frame(s) of {size[0]}x{size[1]}: at least one frame and sides of a multiple of {stride} pixels "
            "are needed; take the size from vae_size or vit_size"
        )


def vae_grid(frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
    """(T, H, W) latent cells of `frames` frames of `size` (H, W) pixels.

    Raises:
        ValueError: if frames is not 4k+1 or a side is not a multiple of 16.
    """
    _check_grid(frames, size, VAE_STRIDE)
    if frames % VAE_FRAMES != 1:
        raise ValueError(f"{frames} frames: the VAE takes 4k+1 frames; take the indices from sample_frames")
    return (frames - 1) // VAE_FRAMES + 1, size[0] // VAE_STRIDE, size[1] // VAE_STRIDE


def has_positions(grid: tuple[int, int, int], frames: int, side: int) -> bool:
    """Whether all cells of a latent grid (T, H, W) have a row in a position table (spec/model.md section 5).

    Cell (i, j, k) reads row i*M*M + j*M + k, so a side may be longer than M as long as the last row exists.

    Args:
        grid: of latents.
        frames: of the table, which has frames * M * M rows.
        side: M.
    """
    t, h, w = grid
    return (t - 1) * side * side + (h - 1) * side + w <= frames * side * side


def vit_grid(frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
    """(T, H, W) ViT tokens, after the 2x2 merge, of `frames` frames of `size` (H, W) pixels.

    An image (one frame) is doubled and an odd clip repeats its last frame, so T is half the frames, rounded up.

    Raises:
        ValueError: if there is no frame or a side is not a multiple of 28.
    """
    _check_grid(frames, size, VIT_STRIDE)
    return -(-frames // VIT_FRAMES), size[0] // VIT_STRIDE, size[1] // VIT_STRIDE
