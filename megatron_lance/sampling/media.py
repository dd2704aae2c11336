"""Pictures and clips on disk.

Station: VAE decoder -> [files].  Pixels are float [3, T, H, W] in -1..1; the prompt is kept in the file's metadata.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, PngImagePlugin

Frames = npt.NDArray[np.uint8]
"""[T, H, W, 3]."""
SHEET_SIDE = 256
"""Pixels of a picture on a contact sheet, the longer side."""


def to_frames(pixels: torch.Tensor) -> Frames:
    """Pixels float [3, T, H, W], clipped to -1..1 -> uint8 [T, H, W, 3]."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 3, 0).contiguous().numpy()


def write_png(path: Path, picture: npt.NDArray[np.uint8], prompt: str) -> None:
    """Write a picture [H, W, 3] with its prompt as text chunk "prompt"."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt", prompt)
    Image.fromarray(picture).save(path, pnginfo=info)


def write_mp4(path: Path, frames: Frames, fps: float, prompt: str) -> None:
    """Write a clip as H.264 with its prompt as metadata "comment"."""
    path.write_bytes(mp4_bytes(frames, fps, prompt))


def mp4_bytes(frames: Frames, fps: float, prompt: str = "") -> bytes:
    """A clip as an MP4 file of H.264."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        container.metadata["comment"] = prompt
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "12"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def gif_bytes(frames: Frames, fps: float) -> bytes:
    """A clip as an animated GIF, which TensorBoard plays."""
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=max(round(1000 / fps), 20), loop=0
    )
    return buffer.getvalue()


def picture_grid(pictures: Sequence[Frames]) -> Frames:
    """Pictures of one size in a square grid, row by row: [1, n H, n W, 3] for up to n * n of them."""
    columns = math.ceil(math.sqrt(len(pictures)))
    blank = [np.zeros_like(pictures[0][0])] * (columns * columns - len(pictures))
    cells = [picture[0] for picture in pictures] + blank
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows, axis=0)[None]


def contact_sheet(samples: Sequence[tuple[Frames, str]], columns: int) -> Image.Image:
    """Samples, no side above SHEET_SIDE pixels, in a grid with their captions.

    Args:
        samples: (frames from `shown_frames`, caption).
        columns: samples per row.
    """
    tiles = [_tile(frames, caption) for frames, caption in samples]
    width, height = max(t.width for t in tiles), max(t.height for t in tiles)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (min(columns, len(tiles)) * width, rows * height), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * width, index // columns * height))
    return sheet


def shown_frames(path: Path) -> Frames:
    """What a contact sheet shows of a file: a picture, or of a clip the first, middle and last frame; made small."""
    if path.suffix == ".png":
        with Image.open(path) as picture:
            return _small(picture)[None]
    with av.open(str(path)) as container:
        count = container.streams.video[0].frames
        wanted = (0, count // 2, count - 1)
        return np.stack([_small(f.to_image()) for i, f in enumerate(container.decode(video=0)) if i in wanted])


def _small(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """A picture of at most SHEET_SIDE pixels a side, [H, W, 3]."""
    small = picture.convert("RGB")
    small.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return np.asarray(small)


def _tile(frames: Frames, caption: str) -> Image.Image:
    """One sample, its frames side by side, with its caption below, wrapped to its width."""
    strip = Image.fromarray(np.concatenate(list(frames), axis=1))
    lines = textwrap.wrap(caption, max(strip.width // 6, 8))
    tile = Image.new("RGB", (strip.width + 8, strip.height + 12 * len(lines) + 10), "white")
    tile.paste(strip, (4, 4))
    ImageDraw.Draw(tile).multiline_text((4, strip.height + 5), "\n".join(lines), fill="black", spacing=1)
    return tile
