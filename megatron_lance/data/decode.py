"""Decoding: media bytes to normalised pixels in one DALI graph (spec/data.md section 3).

Station: pack -> sizes -> [decode requests -> pixels] -> encoders.  In: bytes, frame indices, bucket and size (H, W).
Out: float32 [3, T, H, W] per request, or the MediaError that says why there is none.

The graph: decode node -> centre-crop to the bucket's ratio -> antialiased cubic resize to the bucket -> centre-crop to
the size, all in uint8; pixels are normalised where they are encoded.  The decode node alone is switchable: `host` feeds
frames read by PyAV or PIL, `mixed` feeds packets to NVDEC.  Nothing here is random, so a restart needs no DALI state.

`MediaReader` is the part that a process without a GPU can do, `MediaDecoder` all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIInterpType
from torch.utils.dlpack import from_dlpack

from megatron_lance.config.errors import UserError
from megatron_lance.data.media import (
    MediaError,
    MediaInfo,
    UInt8Array,
    cut_packets,
    is_image,
    probe,
    read_frames,
)
from megatron_lance.data.sizes import crop_window

__all__ = ["DecodeRequest", "MediaDecoder", "MediaError", "MediaInfo", "MediaReader", "ReadMedia", "probe"]

NORMALIZATION = {
    "vae": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "vit": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and standard deviation per RGB channel, on a 0..1 scale; the ViT's are CLIP's."""


@dataclass(frozen=True)
class DecodeRequest:
    """One picture or clip at one size.

    Attributes:
        data: the media file.
        frames: indices of the wanted frames in display order; () or (0,) for an image.
        bucket: (H, W) in pixels to resize to, from sizes.bucket_size.
        size: (H, W) in pixels to crop to, from sizes.vae_size or sizes.vit_size.
        normalize: vae | vit.

    Raises:
        ValueError: if normalize is unknown or size does not fit into bucket.
    """

    data: bytes
    frames: tuple[int, ...]
    bucket: tuple[int, int]
    size: tuple[int, int]
    normalize: str

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZATION:
            raise ValueError(f"normalize {self.normalize!r}: must be one of {', '.join(NORMALIZATION)}")
        if not all(0 < side <= bucket for side, bucket in zip(self.size, self.bucket, strict=True)):
            raise ValueError(f"size {self.size}: must be positive and fit into bucket {self.bucket}")


@dataclass(frozen=True)
class _Clip:
    """What the decode node is fed for one clip.

    Attributes:
        payload: frames, uint8 [F, H, W, 3], or packets, uint8 [bytes].
        frames: indices into the packets.
        width: pixels.
        height: pixels.
    """

    payload: UInt8Array
    frames: tuple[int, ...]
    width: int
    height: int

    @property
    def is_packets(self) -> bool:
        return self.payload.ndim == 1


@dataclass(frozen=True)
class PacketFrames:
    """What is made of a clip's packets.

    Attributes:
        frames: indices into the packets, display order.
        width, height: of the clip, pixels.
        bucket, size: as in `DecodeRequest`.
    """

    frames: tuple[int, ...]
    width: int
    height: int
    bucket: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class ReadMedia:
    """A picture or clip as far as it gets without a GPU; may go from process to process.

    Attributes:
        data: pixels, uint8 [3, T, H, W], or a clip's packets, uint8 [bytes].
        normalize: vae | vit.
        packets: what is made of packets; None for pixels.
        key: of its encoding in a cache; empty where there is no cache.
    """

    data: torch.Tensor
    normalize: str
    packets: PacketFrames | None = None
    key: str = ""


class _GraphError(RuntimeError):
    """A run of the graph failed; DALI does not say which sample was at fault."""

    @property
    def cause(self) -> str:
        """DALI's reason, without the traceback of the pipeline's definition around it."""
        return str(self).rpartition("encountered:")[2].partition("C++ context")[0].strip()


_Shape = tuple[tuple[int, int], tuple[int, int]]
"""Bucket and size of a request."""


def _source(name: str, dtype: DALIDataType, ndim: int = 1, layout: str | None = None) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim, layout=layout)


class _Graph:
    """A DALI pipeline over frames or over packets; built on first use and again after any error.

    Prefetch depth 1: with more, DALI silently returns shifted samples after an error.  A tag per sample goes through
    the graph to prove the order.
    """

    def __init__(self, packets: bool, batch_size: int, threads: int, device_id: int | None) -> None:
        self._packets = packets
        self._batch_size = batch_size
        self._threads = threads
        self._device_id = device_id
        self._pipeline: Pipeline | None = None
        self._tags = count()

    def _decode_node(self) -> Any:
        """The frames, uint8 FHWC."""
        if self._packets:
            return fn.decoders.video(
                _source("packets", DALIDataType.UINT8),
                frames=_source("frames", DALIDataType.INT32),
                device="cpu" if self._device_id is None else "mixed",
                pad_mode="none",
                affine=False,  # ranks of one host would pin their threads to the same cores
            )
        video = _source("video", DALIDataType.UINT8, ndim=4, layout="FHWC")
        return video if self._device_id is None else video.gpu()

    def _build(self) -> Pipeline:
        pipeline = Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._device_id,
            prefetch_queue_depth=1,
            exec_dynamic=True,  # outputs stay valid across runs
        )
        with pipeline:
            video: Any = fn.resize(
                self._decode_node(),
                roi_start=_source("roi_start", DALIDataType.FLOAT),
                roi_end=_source("roi_end", DALIDataType.FLOAT),
                size=_source("bucket", DALIDataType.FLOAT),
                interp_type=DALIInterpType.INTERP_CUBIC,
                antialias=True,
            )
            video = fn.crop_mirror_normalize(
                video, crop=_source("size", DALIDataType.FLOAT), dtype=DALIDataType.UINT8, output_layout="CFHW"
            )
            pipeline.set_outputs(video, fn.copy(_source("tag", DALIDataType.INT64)))
        pipeline.build()
        return pipeline

    def _feed(self, clips: Sequence[_Clip], shapes: Sequence[_Shape]) -> dict[str, list[np.ndarray]]:
        """The inputs of one run by name, one array per sample."""
        windows = [crop_window(c.width, c.height, bucket) for c, (bucket, _) in zip(clips, shapes, strict=True)]
        feed: dict[str, list[np.ndarray]] = {
            "roi_start": [np.array(w[:2], np.float32) for w in windows],
            "roi_end": [np.array((w[0] + w[2], w[1] + w[3]), np.float32) for w in windows],
            "bucket": [np.array(bucket, np.float32) for bucket, _ in shapes],
            "size": [np.array(size, np.float32) for _, size in shapes],
            "packets" if self._packets else "video": [c.payload for c in clips],
            "tag": [np.array([tag], np.int64) for _, tag in zip(shapes, self._tags, strict=False)],
        }
        if self._packets:
            feed["frames"] = [np.array(c.frames, np.int32) for c in clips]
        return feed

    def run(self, clips: Sequence[_Clip], shapes: Sequence[_Shape]) -> list[torch.Tensor]:
        """One tensor per clip, uint8 [3, T, H, W].

        Raises:
            _GraphError: if DALI fails.
            RuntimeError: if samples come back out of order.
        """
        feed = self._feed(clips, shapes)
        pipeline, self._pipeline = self._pipeline, None  # kept only if the run succeeds
        try:
            pipeline = pipeline or self._build()
            for name, arrays in feed.items():
                pipeline.feed_input(name, arrays)
            pixels, tags = pipeline.run()
        except RuntimeError as error:
            raise _GraphError(str(error)) from error
        tensors = [from_dlpack(pixels[i]) for i in range(len(shapes))]
        returned = [int(tag) for tag in np.asarray(tags.as_cpu().as_array()).ravel()]
        expected = [int(tag[0]) for tag in feed["tag"]]
        if returned != expected:
            raise RuntimeError(f"DALI returned samples {returned} where {expected} were fed")
        for tensor, clip, (_, size) in zip(tensors, clips, shapes, strict=True):
            shape = (3, len(clip.frames), *size)
            if tuple(tensor.shape) != shape:
                raise RuntimeError(f"DALI returned a sample of shape {tuple(tensor.shape)} where {shape} was asked for")
        self._pipeline = pipeline
        return tensors


class MediaReader:
    """Reads requests of mixed kinds and sizes on the CPU; a bad one never takes others down. Not for several threads.

    Args:
        decode: host (PyAV and PIL, any codec) | mixed (a clip's packets, for NVDEC to decode; pictures as in host).
        threads: CPU threads for reading, and as many for DALI.

    Raises:
        ValueError: if decode is unknown or threads is not positive.
    """

    def __init__(self, decode: str, threads: int) -> None:
        if decode not in ("host", "mixed"):
            raise ValueError(f"decode {decode!r}: must be host or mixed")
        if threads < 1:
            raise ValueError(f"decode_threads {threads}: must be at least 1")
        self._settings = decode, threads
        self._cut = decode == "mixed"
        self._batch_size = 2 * threads  # a condition is often asked for at its VAE and its ViT size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="media")
        self._graph = _Graph(False, self._batch_size, threads, None)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy made by pickling has threads and a graph of its own."""
        return MediaReader, self._settings

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[ReadMedia | MediaError]:
        """Reads all requests; frames asked for at several sizes are read once.

        Returns:
            In the order of the requests: pixels or packets, T = frames (1 for an image); or the MediaError that names
            the cause.

        Raises:
            RuntimeError: if DALI fails.
        """
        same_clip: dict[tuple[bytes, tuple[int, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            same_clip.setdefault((request.data, request.frames), []).append(i)
        order = [i for indices in same_clip.values() for i in indices]
        results: dict[int, ReadMedia | MediaError] = {}
        for start in range(0, len(order), self._batch_size):
            results |= self._read_batch({i: requests[i] for i in order[start : start + self._batch_size]})
        return [results[i] for i in range(len(requests))]

    def _read_batch(self, requests: dict[int, DecodeRequest]) -> dict[int, ReadMedia | MediaError]:
        """One run of the graph at most, keyed as the requests are."""
        sources = list(dict.fromkeys((r.data, r.frames) for r in requests.values()))
        read = dict(zip(sources, self._pool.map(self._read, sources), strict=True))
        results: dict[int, ReadMedia | MediaError] = {}
        clips: dict[int, _Clip] = {}
        for i, request in requests.items():
            clip = read[request.data, request.frames]
            if isinstance(clip, MediaError):
                results[i] = clip
            elif clip.is_packets:
                made = PacketFrames(clip.frames, clip.width, clip.height, request.bucket, request.size)
                results[i] = ReadMedia(torch.tensor(clip.payload), request.normalize, made)
            else:
                clips[i] = clip
        if clips:
            pixels = self._graph.run(list(clips.values()), [(requests[i].bucket, requests[i].size) for i in clips])
            results |= {i: ReadMedia(p, requests[i].normalize) for i, p in zip(clips, pixels, strict=True)}
        return results

    def _read(self, source: tuple[bytes, tuple[int, ...]]) -> _Clip | MediaError:
        """The decode node's input for one clip; an error is returned, so that other clips go on."""
        data, frames = source
        try:
            if self._cut and not is_image(data):
                cut = cut_packets(data, frames)
                return _Clip(cut.data, cut.frames, cut.width, cut.height)
            pixels = read_frames(data, frames)
        except MediaError as error:
            return error
        return _Clip(pixels, tuple(range(len(pixels))), width=pixels.shape[2], height=pixels.shape[1])


class MediaDecoder:
    """Decodes requests of mixed kinds and sizes; a bad one never takes others down. Not for use by several threads.

    Attributes:
        reader: does what needs no GPU.

    Args:
        decode: host (PyAV and PIL, any codec, no GPU needed) | mixed (clips by NVDEC; pictures as in host).
        threads: CPU threads for reading, and as many for DALI.
        device_id: the GPU that holds the results and runs NVDEC; None: the CPU.

    Raises:
        ValueError: if decode is unknown or threads is not positive.
        UserError: if mixed has no GPU.
    """

    def __init__(self, decode: str, threads: int, device_id: int | None = None) -> None:
        if decode == "mixed" and (device_id is None or not torch.cuda.is_available()):
            raise UserError("data.decode = mixed: NVDEC needs a GPU, and there is none here; set data.decode=host")
        self.reader = MediaReader(decode, threads)
        self._device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        self._batch_size = 2 * threads
        self._graph = _Graph(True, self._batch_size, threads, device_id)

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[torch.Tensor | MediaError]:
        """Decodes all requests; frames asked for at several sizes are read once.

        Returns:
            In the order of the requests: float32 [3, T, H, W], T = frames (1 for an image), on the CPU or the GPU of
            device_id; or the MediaError that names the cause.

        Raises:
            RuntimeError: if DALI fails for another reason than a broken clip.
        """
        read = self.reader(requests)
        pixels = iter(self.finish([r for r in read if isinstance(r, ReadMedia)]))
        return [next(pixels) if isinstance(r, ReadMedia) else r for r in read]

    def finish(self, media: Sequence[ReadMedia]) -> list[torch.Tensor | MediaError]:
        """What is left to do for media that a `MediaReader` has read; results as of a call."""
        packets = {i: m for i, m in enumerate(media) if m.packets is not None}
        decoded: dict[int, torch.Tensor | MediaError] = {}
        numbers = list(packets)
        for start in range(0, len(numbers), self._batch_size):
            decoded |= self._decode({i: packets[i] for i in numbers[start : start + self._batch_size]})
        results: list[torch.Tensor | MediaError] = []
        for i, one in enumerate(media):
            pixels = decoded.get(i, one.data)
            results.append(pixels if isinstance(pixels, MediaError) else self._normalize(pixels, one.normalize))
        return results

    def _normalize(self, pixels: torch.Tensor, normalize: str) -> torch.Tensor:
        """Float32 on the device of uint8 [3, T, H, W]."""
        mean, std = (255 * torch.tensor(v, device=self._device).view(3, 1, 1, 1) for v in NORMALIZATION[normalize])
        return pixels.to(self._device).float().sub_(mean).div_(std)

    def _decode(self, media: dict[int, ReadMedia]) -> dict[int, torch.Tensor | MediaError]:
        """Runs the graph over packets; where it fails, runs each clip alone to find the broken ones."""
        made = {i: m.packets for i, m in media.items() if m.packets is not None}
        clips = [_Clip(media[i].data.numpy(), p.frames, p.width, p.height) for i, p in made.items()]
        try:
            pixels = self._graph.run(clips, [(p.bucket, p.size) for p in made.values()])
        except _GraphError as error:
            if len(media) == 1:
                return {i: MediaError(f"the video decoder failed: {error.cause}") for i in media}
            return {i: out for j in media for i, out in self._decode({j: media[j]}).items()}
        return dict(zip(media, pixels, strict=True))
