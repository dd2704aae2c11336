"""Damaged pictures and clips, made from good ones.

Station: good media -> [damaged files] -> benchmark of damaged media.  What is made of a good file is a function of that
file and of its own name.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from megatron_lance.packing.rng import stream

TRUNCATED = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
"""Shares of a file that are left."""
FLIPPED = (1, 4, 16, 64, 256, 1024)
"""Bytes that are changed."""
HUGE = 0xFFFF
SIDE = 96
"""Pixels of what is drawn here."""


class Damaged(NamedTuple):
    """A file.

    Attributes:
        name: unique.
        damage: what was done to it.
        kind: image or video, of the good file in whose place it stands.
        data: its bytes.
        good: name of the file it was made from; empty if it is not made from one.
    """

    name: str
    damage: str
    kind: str
    data: bytes
    good: str = ""


def clip(
    frames: int = 13,
    width: int = SIDE,
    height: int = SIDE,
    codec: str = "libx264",
    container: str = "mp4",
    pixel_format: str = "yuv420p",
    times: Sequence[int] | None = None,
    rate: int = 12,
    preset: str = "ultrafast",
) -> bytes:
    """A drawn clip of `rate` frames per second; `times` are of its frames, in frames; `preset` is x264's."""
    file = io.BytesIO()
    options = {"preset": preset, "threads": "1"} if codec == "libx264" else {"threads": "1"}
    with av.open(file, "w", format=container) as output:
        target = output.add_stream(codec, rate=rate, options=options)
        assert isinstance(target, av.VideoStream)
        target.width, target.height, target.pix_fmt = width, height, pixel_format
        target.codec_context.time_base = Fraction(1, rate)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(_picture(width, height, number), format="rgb24")
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, rate)
            output.mux(target.encode(frame))
        output.mux(target.encode())
    return file.getvalue()


def picture(image_format: str, mode: str = "RGB") -> bytes:
    """A drawn picture."""
    file = io.BytesIO()
    Image.fromarray(_picture(SIDE, SIDE, 0)).convert(mode).save(file, image_format)
    return file.getvalue()


def _picture(width: int, height: int, number: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([(x + 5 * number) % 256, (2 * y) % 256, (x * y // 8 + number) % 256], -1).astype(np.uint8)


def _sound(container: str) -> bytes:
    """A file without pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        target = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(target.encode(frame))
        output.mux(target.encode())
    return file.getvalue()


def _two_sizes(container: str) -> bytes:
    """A clip whose second half has another size."""
    file = io.BytesIO()
    halves = [clip(8, SIDE, SIDE, container="mpegts"), clip(8, SIDE // 2, 2 * SIDE, container="mpegts")]
    with av.open(file, "w", format=container) as output:
        behind = 0
        target = None
        for half in halves:
            with av.open(io.BytesIO(half), "r") as source:
                target = target or output.add_stream_from_template(source.streams.video[0])
                packets = [packet for packet in source.demux(video=0) if packet.size]
                first, step = min(p.dts or 0 for p in packets), 7500  # ticks of 1/90000 s
                for packet in packets:
                    packet.pts, packet.dts = (packet.pts or 0) - first + behind, (packet.dts or 0) - first + behind
                    packet.stream = target
                    output.mux(packet)
                behind += 8 * step
    return file.getvalue()


def _patched(data: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    """MP4 with bytes written at an offset behind the begin of a box's type; the whole file if there is no such box."""
    at = data.find(box)
    if at < 0:
        return data
    return data[: at + offset] + value + data[at + offset + len(value) :]


def _flipped(data: bytes, count: int, name: str) -> bytes:
    """Some bytes changed, wherever they lie."""
    rng = stream(1, "damage", name)
    changed = np.frombuffer(data, np.uint8).copy()
    changed[rng.integers(len(data), size=count)] ^= rng.integers(1, 256, size=count, dtype=np.uint8)
    return changed.tobytes()


def _cuts(name: str, kind: str, data: bytes) -> Iterator[Damaged]:
    """What may befall any file."""
    for share in TRUNCATED:
        yield Damaged(f"{name} first {share:.0%}", "truncated", kind, data[: max(1, int(share * len(data)))], name)
    for count in FLIPPED:
        yield Damaged(f"{name} {count} flipped", "flipped bytes", kind, _flipped(data, count, f"{name} {count}"), name)
    third = len(data) // 3
    yield Damaged(f"{name} hole", "zeros within", kind, data[:third] + bytes(third) + data[2 * third :], name)
    yield Damaged(f"{name} without begin", "begin lost", kind, data[256:], name)
    yield Damaged(f"{name} zeros", "all zeros", kind, bytes(len(data)), name)


def _mp4_headers(name: str, data: bytes) -> Iterator[Damaged]:
    """Lies in the headers of an MP4 file."""
    size = struct.pack(">HH", HUGE, HUGE)
    quarter_turn = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    patches = {
        "huge picture in the sample entry": (b"avc1", 28, size),
        "no picture in the sample entry": (b"avc1", 28, bytes(4)),
        "huge picture in the track": (b"tkhd", 80, struct.pack(">II", HUGE << 16, HUGE << 16)),
        "huge number of packets": (b"stsz", 12, struct.pack(">I", 0x7FFFFFFF)),
        "huge packets": (b"stsz", 8, struct.pack(">I", 0x7FFFFFF0)),
        "huge media box": (b"mdat", -4, struct.pack(">I", 0xFFFFFFFF)),
        "huge movie box": (b"moov", -4, struct.pack(">I", 0x7FFFFFFF)),
        "no time scale": (b"mdhd", 16, bytes(4)),
        "unknown codec": (b"avc1", 0, b"zzzz"),
        "no codec settings": (b"avcC", 0, b"free"),
        "packets out of the file": (b"stco", 12, struct.pack(">I", 0x7FFFFFFF)),
    }
    for what, (box, offset, value) in patches.items():
        yield Damaged(f"{name} {what}", "lying header", "video", _patched(data, box, offset, value), name)
    yield Damaged(f"{name} rotated", "rotated", "video", _patched(data, b"tkhd", 44, quarter_turn), name)
    late = struct.pack(">i", 6000)
    yield Damaged(f"{name} edit list that begins later", "edit list", "video", _patched(data, b"elst", 16, late), name)
    short = struct.pack(">I", 300)
    yield Damaged(f"{name} edit list that ends early", "edit list", "video", _patched(data, b"elst", 12, short), name)


def _picture_headers() -> Iterator[Damaged]:
    png, jpeg = picture("PNG"), picture("JPEG")
    for side in (HUGE, 0x7FFFFFFF, 0):
        chunk = png[12:16] + struct.pack(">II", side, side) + png[24:29]
        header = png[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]
        yield Damaged(f"PNG of {side} x {side}", "huge header size", "image", header)
    frame = jpeg.find(b"\xff\xc0")
    yield Damaged("JPEG huge", "huge header size", "image", jpeg[: frame + 5] + b"\xff" * 4 + jpeg[frame + 9 :])
    yield Damaged("JPEG without tables", "lying header", "image", jpeg.replace(b"\xff\xdb", b"\xff\xfe"))
    yield Damaged("PNG with an unknown chunk", "lying header", "image", png.replace(b"IDAT", b"IDAX"))


def _wrong_files() -> Iterator[Damaged]:
    """Files that are something else than they should be."""
    good, jpeg = clip(), picture("JPEG")
    others = {
        "nothing": b"",
        "a byte": b"\0",
        "a web page": b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
        "a JSON error": b'{"error": "not found"}',
        "a ZIP file": b"PK\x03\x04" + bytes(200),
        "a playlist": b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/a.ts\n",
        "a list to join": b"ffconcat version 1.0\nfile /etc/hostname\n",
        "noise": stream(1, "damage", "noise").bytes(20_000),
        "an MP4 head and noise": good[:32] + stream(1, "damage", "more noise").bytes(20_000),
        "a JPEG head and a clip": jpeg[:20] + good,
        "an MP4 head and Matroska": good[:32] + clip(container="matroska"),
    }
    for name, data in others.items():
        damage = "empty" if not data else "wrong container"
        yield from (Damaged(f"{name} as {kind}", damage, kind, data) for kind in ("image", "video"))
    yield Damaged("a picture as video", "wrong container", "video", jpeg)
    yield Damaged("a clip as image", "wrong container", "image", good)


def _odd_files() -> Iterator[Damaged]:
    """Files that are whole but odd."""
    for container in ("mp4", "matroska"):
        yield Damaged(f"sound in {container}", "no video stream", "video", _sound(container))
    for container in ("mp4", "matroska", "mpegts"):
        yield Damaged(f"one frame in {container}", "one frame", "video", clip(1, container=container))
    yield Damaged("2 x 2", "1x1", "video", clip(13, 2, 2))
    for codec, pixels in (("mjpeg", "yuvj444p"), ("ffv1", "bgr0")):
        yield Damaged(f"1 x 1 in {codec}", "1x1", "video", clip(13, 1, 1, codec, "matroska", pixels))
    uneven = [0, 1, 2, 5, 6, 7, 20, 21, 40, 41, 42, 43, 100]
    for container in ("mp4", "matroska"):
        yield Damaged(f"uneven times in {container}", "variable rate", "video", clip(container=container, times=uneven))
    for container in ("mpegts", "matroska"):
        yield Damaged(f"two sizes in {container}", "changed resolution", "video", _two_sizes(container))
    for container in ("matroska", "avi", "flv", "mpegts", "h264"):
        yield Damaged(f"H.264 in {container}", "other container", "video", clip(container=container))
    for mode in ("L", "CMYK"):
        yield Damaged(f"{mode} as JPEG", "other mode", "image", picture("JPEG", mode))
    for mode in ("P", "RGBA", "LA", "1"):
        yield Damaged(f"{mode} as PNG", "other mode", "image", picture("PNG", mode))
    yield Damaged("GIF", "wrong container", "image", picture("GIF"))


def damaged_files(clips: dict[str, bytes], pictures: dict[str, bytes]) -> list[Damaged]:
    """All of them.

    Args:
        clips: good MP4 files by name.
        pictures: good picture files by name.
    """
    found = [*_wrong_files(), *_odd_files(), *_picture_headers()]
    for name, data in clips.items():
        found += [*_cuts(name, "video", data), *_mp4_headers(name, data)]
    for name, data in pictures.items():
        found += _cuts(name, "image", data)
    return found
