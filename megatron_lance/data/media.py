"""Media bytes read on the CPU: facts (probe), RGB frames, or the packets that hold some frames.

Station: record -> [media bytes -> facts] -> sizes; decode request -> [media bytes -> frames or packets] -> DALI graph
(decode.py).  In: the bytes of a JPEG, PNG or WebP picture or of a video file.  Out: numbers, or uint8 arrays.
Frames are counted by displayable packets and matched by presentation timestamp (pts), never by a header's count.
Pictures and clips are taken as stored: orientation tags are not applied.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, UnidentifiedImageError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
_IMAGE_BEGINS = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n"}
VIDEO_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif"
"""FFmpeg demuxers; playlists and the like are left out because they open further files."""

MAX_PIXELS = 1 << 25
"""Of a clip's frame, a little more than 8K: a small file may hold far larger ones, by which memory runs out."""

_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
# BT.601 whatever the clip's tag says, as DALI's decoders do.  These are PyAV's own swscale flags; with
# FULL_CHR_H_INT | ACCURATE_RND the pixels are DALI's CPU decoder's bit for bit, at 3.5 times the cost per frame.
_METADATA: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
"""For titles and the like that are no UTF-8; from version 19 on PyAV takes them as they are."""
_INTERPOLATION = Interpolation.BILINEAR
_COLORSPACE = Colorspace.ITU601

UInt8Array = npt.NDArray[np.uint8]


class MediaError(ValueError):
    """A picture or clip that cannot be used; the message names the cause."""


@dataclass(frozen=True)
class MediaInfo:
    """What is known of a picture or clip without decoding it.

    Attributes:
        kind: image or video.
        width: pixels.
        height: pixels.
        n_frames: displayable frames; 1 for an image.
        average_fps: frames per second; 0.0 for an image.
    """

    kind: Literal["image", "video"]
    width: int
    height: int
    n_frames: int
    average_fps: float


@dataclass(frozen=True)
class ClipPackets:
    """The part of a clip that some of its frames need, as a small file of its own.

    Attributes:
        data: Matroska file, uint8 [bytes], from a keyframe to the last needed packet.
        frames: where the wanted frames lie in it, display order.
        width: pixels.
        height: pixels.
    """

    data: UInt8Array
    frames: tuple[int, ...]
    width: int
    height: int


def probe(data: bytes) -> MediaInfo:
    """Kind, size, frame count and rate of a picture or clip (spec/data.md section 3).

    Only headers are read, and that the end is there: nothing is decoded.  A clip without a whole table of its packets
    is read packet by packet.

    Raises:
        MediaError: if the bytes are empty, unreadable, truncated, or hold no video stream.
    """
    image = None if _is_mp4(data) else _open_image(data)
    if image is not None:
        if not _has_end(image, data):
            raise MediaError(f"truncated {image.format} image of {image.width}x{image.height}: its end is missing")
        return MediaInfo("image", image.width, image.height, 1, 0.0)
    with _open_video(data) as (container, stream):
        n_frames = _listed_frames(container, stream, len(data)) or len(_display_order(_demux(container, stream)))
        if not stream.average_rate:
            raise MediaError("video stream has no frame rate")
        return MediaInfo("video", stream.width, stream.height, n_frames, float(stream.average_rate))


def is_image(data: bytes) -> bool:
    """Whether the bytes begin like a picture. Raises MediaError if they are empty."""
    return _open_image(data) is not None


def read_frames(data: bytes, frames: tuple[int, ...]) -> UInt8Array:
    """The wanted frames, uint8 [F, H, W, 3] RGB, any order, repeats allowed; for an image `frames` is () or (0,).

    Alpha is composed on white.

    Raises:
        MediaError: if the bytes cannot be read or decoded, or a frame index lies outside.
    """
    image = _open_image(data)
    if image is None:
        return _read_video(data, frames)
    if frames not in ((), (0,)):
        raise MediaError(f"frames {frames} requested, but the bytes are a single {image.format} image")
    _load(image)
    return _to_rgb(image)[None]


def cut_packets(data: bytes, frames: tuple[int, ...]) -> ClipPackets:
    """The packets that the wanted frames of a clip need, for a decoder that cannot seek.

    Raises:
        MediaError: if the bytes cannot be read or a frame index lies outside.
    """
    with _open_video(data) as (container, stream):
        packets = _demux(container, stream)
        wanted = _pick(_display_order(packets), frames)
        needed = _needed(packets, wanted)
        rank = {pts: i for i, pts in enumerate(sorted({_pts(p) for p in needed}))}
        first = min(rank)
        file = io.BytesIO()
        with av.open(file, "w", format="matroska") as output:
            target = output.add_stream_from_template(stream, opaque=True)
            for packet in needed:
                packet.pts = _pts(packet) - first
                packet.dts = None if packet.dts is None else packet.dts - first
                packet.stream = target
                output.mux(packet)
        return ClipPackets(
            np.frombuffer(file.getvalue(), np.uint8), tuple(rank[pts] for pts in wanted), stream.width, stream.height
        )


def _is_mp4(data: bytes) -> bool:
    return data[4:8] == b"ftyp"


def _open_image(data: bytes) -> Image.Image | None:
    """The picture, its pixels not yet read, or None if the bytes do not begin like one."""
    if not data:
        raise MediaError("no bytes: the media column is empty")
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        if begun := next((name for name, begin in _IMAGE_BEGINS.items() if data.startswith(begin)), None):
            raise MediaError(f"unreadable {begun} image of {len(data)} bytes: its header is broken") from error
        return None
    except _IMAGE_ERRORS as error:
        raise MediaError(f"unreadable image: {error}") from error


def _has_end(image: Image.Image, data: bytes) -> bool:
    """Whether a picture's end mark is there: of a JPEG behind its last scan, for a preview has one too."""
    if image.format == "JPEG":
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    if image.format == "PNG":
        return b"IEND" in data[-4096:]
    return int.from_bytes(data[4:8], "little") + 8 <= len(data)


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except _IMAGE_ERRORS as error:
        raise MediaError(f"broken {image.format} image of {image.width}x{image.height}: {error}") from error


def _to_rgb(image: Image.Image) -> UInt8Array:
    """uint8 [H, W, 3] of a loaded picture of any mode; alpha on white, 16-bit grey by its high byte."""
    if image.mode.startswith("I"):
        grey = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
        return np.asarray(grey.convert("RGB"))
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(canvas)


@contextmanager
def _open_video(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The first video stream; FFmpeg errors inside the block become MediaErrors."""
    try:
        with av.open(
            io.BytesIO(data),
            "r",
            format="mov" if _is_mp4(data) else None,  # so that FFmpeg need not try its demuxers
            options={"format_whitelist": VIDEO_FORMATS},
            **_METADATA,
        ) as container:
            if not container.streams.video:
                raise MediaError(f"no video stream in the {container.format.name} file")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise MediaError("the video stream's codec is unknown")
            if stream.width < 1 or stream.height < 1:
                raise MediaError(f"the video stream has no picture size: {stream.width}x{stream.height}")
            if stream.width * stream.height > MAX_PIXELS:
                raise MediaError(f"the video is of {stream.width}x{stream.height}, more than {MAX_PIXELS} pixels")
            stream.thread_count = 1  # clips are decoded side by side instead
            yield container, stream
    except av.FFmpegError as error:
        hint = "; an MP4 file that is truncated or has no moov atom" if _is_mp4(data) else ""
        raise MediaError(f"unreadable or broken video of {len(data)} bytes: {error.strerror}{hint}") from error


def _listed_frames(container: InputContainer, stream: VideoStream, length: int) -> int:
    """Displayable frames by the packet table of an MP4 file of `length` bytes; 0 if it has none that is whole."""
    if not container.format.name.startswith("mov") or len(stream.index_entries) != stream.frames:
        return 0  # fragments, or an edit list that repeats or leaves out packets
    shown = 0
    for entry in stream.index_entries:
        if entry.pos + entry.size > length:
            raise MediaError("truncated video: a packet is incomplete")
        shown += not entry.is_discard
    return shown


def _pts(packet: av.Packet) -> int:
    if packet.pts is None:
        raise MediaError("a video packet has no timestamp; remux the clip to MP4 or Matroska")
    return packet.pts


def _demux(container: InputContainer, stream: VideoStream) -> list[av.Packet]:
    """The stream's packets, decoding order."""
    try:
        packets = [packet for packet in container.demux(stream) if packet.size]
    except IndexError as error:  # PyAV: a stream that the header does not know
        raise MediaError("broken video: a packet belongs to an unknown stream") from error
    if any(packet.is_corrupt for packet in packets):
        raise MediaError("truncated video: a packet is incomplete")
    if not packets:
        raise MediaError("video stream has no packets")
    return packets


def _display_order(packets: list[av.Packet]) -> list[int]:
    """The pts of the frames to be shown, ascending."""
    return sorted({_pts(packet) for packet in packets if not packet.is_discard})


def _pick(shown: list[int], frames: tuple[int, ...]) -> list[int]:
    """The pts of the wanted frames."""
    if not frames or min(frames) < 0 or max(frames) >= len(shown):
        raise MediaError(f"frames {frames} requested of a clip of {len(shown)}; indices must lie in [0, {len(shown)})")
    return [shown[i] for i in frames]


def _needed(packets: list[av.Packet], wanted: list[int]) -> list[av.Packet]:
    """The packets from the last keyframe at or before the first wanted frame to the last wanted frame."""
    first, last = min(wanted), max(wanted)
    start = max((i for i, p in enumerate(packets) if p.is_keyframe and _pts(p) <= first), default=0)
    stop = 1 + max(i for i, p in enumerate(packets) if _pts(p) <= last)
    # Frames shown before an open group's keyframe refer to packets that are cut away.
    needed = [p for p in packets[start:stop] if _pts(p) >= _pts(packets[start])]
    lost = set(wanted) - {_pts(p) for p in needed}
    if lost:
        raise MediaError(f"broken video: {len(lost)} of the wanted frames lie before its first keyframe")
    return needed


def _frame_to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> UInt8Array:
    """uint8 [H, W, 3]."""
    rgb = reformatter.reformat(
        frame,
        format="rgb24",
        src_colorspace=_COLORSPACE,
        dst_colorspace=_COLORSPACE,
        interpolation=_INTERPOLATION,
        threads=1,
    )
    return np.asarray(rgb.to_ndarray(), np.uint8)


def _read_video(data: bytes, frames: tuple[int, ...]) -> UInt8Array:
    """uint8 [F, H, W, 3] of a clip."""
    with _open_video(data) as (container, stream):
        packets = _demux(container, stream)
        wanted = _pick(_display_order(packets), frames)
        missing = set(wanted)
        rgb: dict[int, UInt8Array] = {}
        reformatter = VideoReformatter()
        for packet in [*_needed(packets, wanted), None]:  # None: flush
            for frame in stream.decode(packet):
                if frame.pts in missing and not frame.is_corrupt:
                    missing.remove(frame.pts)
                    rgb[frame.pts] = _frame_to_rgb(frame, reformatter)
            if not missing:
                break
    if missing:
        broken = sorted(frames[wanted.index(pts)] for pts in missing)
        raise MediaError(f"broken video: frames {broken} do not decode")
    if len({frame.shape for frame in rgb.values()}) > 1:
        raise MediaError("the frame size changes within the clip")
    return np.stack([rgb[pts] for pts in wanted])
