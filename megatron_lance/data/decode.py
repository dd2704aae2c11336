"""Decoding: media bytes to normalised pixels in one DALI graph (spec/data.md section 3).

Station: pack -> sizes -> [decode requests -> pixels] -> encoders.  In: bytes, frame indices, bucket and size (H, W).
Out: float32 [3, T, H, W] per request, or the MediaError that says why there is none.

The graph: decode node -> centre-crop to the bucket's ratio -> antialiased cubic resize to the bucket -> centre-crop to
the size -> normalise.  The decode node alone is switchable: `host` feeds frames read by PyAV or PIL, `mixed` feeds
packets to NVDEC.  Nothing here is random, so a restart needs no DALI state.
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

__all__ = ["DecodeRequest", "MediaDecoder", "MediaError", "MediaInfo", "NORMALIZATION", "probe"]

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


class _GraphError(RuntimeError):
    """A run of the graph failed; DALI does not say which sample was at fault."""

    @property
    def cause(self) -> str:
        """DALI's reason, without the traceback of the pipeline's definition around it."""
        return str(self).rpartition("encountered:")[2].partition("C++ context")[0].strip()


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
            video: Any = fn.slice(
                self._decode_node(),
                start=_source("corner", DALIDataType.INT32),
                shape=_source("window", DALIDataType.INT32),
                axis_names="HW",
            )
            video = fn.resize(
                video,
                size=_source("bucket", DALIDataType.FLOAT),
                interp_type=DALIInterpType.INTERP_CUBIC,
                antialias=True,
            )
            video = fn.crop_mirror_normalize(
                video,
                crop=_source("size", DALIDataType.FLOAT),
                mean=_source("mean", DALIDataType.FLOAT),
                std=_source("std", DALIDataType.FLOAT),
                dtype=DALIDataType.FLOAT,
                output_layout="CFHW",
            )
            pipeline.set_outputs(video, fn.copy(_source("tag", DALIDataType.INT64)))
        pipeline.build()
        return pipeline

    def _feed(self, clips: Sequence[_Clip], requests: Sequence[DecodeRequest]) -> dict[str, list[np.ndarray]]:
        """The inputs of one run by name, one array per sample."""
        windows = [crop_window(c.width, c.height, r.bucket) for c, r in zip(clips, requests, strict=True)]
        feed: dict[str, list[np.ndarray]] = {
            "corner": [np.array(w[:2], np.int32) for w in windows],
            "window": [np.array(w[2:], np.int32) for w in windows],
            "bucket": [np.array(r.bucket, np.float32) for r in requests],
            "size": [np.array(r.size, np.float32) for r in requests],
            "mean": [255 * np.array(NORMALIZATION[r.normalize][0], np.float32) for r in requests],
            "std": [255 * np.array(NORMALIZATION[r.normalize][1], np.float32) for r in requests],
            "packets" if self._packets else "video": [c.payload for c in clips],
            "tag": [np.array([tag], np.int64) for _, tag in zip(requests, self._tags, strict=False)],
        }
        if self._packets:
            feed["frames"] = [np.array(c.frames, np.int32) for c in clips]
        return feed

    def run(self, clips: Sequence[_Clip], requests: Sequence[DecodeRequest]) -> list[torch.Tensor]:
        """One tensor per clip, float32 [3, T, H, W].

        Raises:
            _GraphError: if DALI fails.
            RuntimeError: if samples come back out of order.
        """
        feed = self._feed(clips, requests)
        pipeline, self._pipeline = self._pipeline, None  # kept only if the run succeeds
        try:
            pipeline = pipeline or self._build()
            for name, arrays in feed.items():
                pipeline.feed_input(name, arrays)
            pixels, tags = pipeline.run()
        except RuntimeError as error:
            raise _GraphError(str(error)) from error
        tensors = [from_dlpack(pixels[i]) for i in range(len(requests))]
        returned = [int(tag) for tag in np.asarray(tags.as_cpu().as_array()).ravel()]
        expected = [int(tag[0]) for tag in feed["tag"]]
        if returned != expected:
            raise RuntimeError(f"DALI returned samples {returned} where {expected} were fed")
        for tensor, clip, request in zip(tensors, clips, requests, strict=True):
            shape = (3, len(clip.frames), *request.size)
            if tuple(tensor.shape) != shape:
                raise RuntimeError(f"DALI returned a sample of shape {tuple(tensor.shape)} where {shape} was asked for")
        self._pipeline = pipeline
        return tensors


class MediaDecoder:
    """Decodes requests of mixed kinds and sizes; a bad one never takes others down. Not for use by several threads.

    Args:
        decode: host (PyAV and PIL, any codec, no GPU needed) | mixed (clips by NVDEC; pictures as in host).
        threads: CPU threads for reading, and as many for DALI.
        device_id: the GPU that runs the graph and holds the results; None: the CPU.

    Raises:
        ValueError: if decode is unknown or threads is not positive.
        UserError: if mixed has no GPU.
    """

    def __init__(self, decode: str, threads: int, device_id: int | None = None) -> None:
        if decode not in ("host", "mixed"):
            raise ValueError(f"decode {decode!r}: must be host or mixed")
        if threads < 1:
            raise ValueError(f"decode_threads {threads}: must be at least 1")
        if decode == "mixed" and (device_id is None or not torch.cuda.is_available()):
            raise UserError("data.decode = mixed: NVDEC needs a GPU, and there is none here; set data.decode=host")
        self._cut = decode == "mixed"
        self._batch_size = 2 * threads  # a condition is often asked for at its VAE and its ViT size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="media")
        self._graphs = {packets: _Graph(packets, self._batch_size, threads, device_id) for packets in (False, True)}

    def __call__(self, requests: Sequence[DecodeRequest]) -> list[torch.Tensor | MediaError]:
        """Decodes all requests; frames asked for at several sizes are read once.

        Returns:
            In the order of the requests: float32 [3, T, H, W], T = frames (1 for an image), on the CPU or the GPU of
            device_id; or the MediaError that names the cause.

        Raises:
            RuntimeError: if DALI fails for another reason than a broken clip.
        """
        same_clip: dict[tuple[bytes, tuple[int, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            same_clip.setdefault((request.data, request.frames), []).append(i)
        order = [i for indices in same_clip.values() for i in indices]
        results: dict[int, torch.Tensor | MediaError] = {}
        for start in range(0, len(order), self._batch_size):
            results |= self._decode_batch({i: requests[i] for i in order[start : start + self._batch_size]})
        return [results[i] for i in range(len(requests))]

    def _decode_batch(self, requests: dict[int, DecodeRequest]) -> dict[int, torch.Tensor | MediaError]:
        """One run of each graph at most, keyed as the requests are."""
        sources = list(dict.fromkeys((r.data, r.frames) for r in requests.values()))
        read = dict(zip(sources, self._pool.map(self._read, sources), strict=True))
        results: dict[int, torch.Tensor | MediaError] = {}
        clips: dict[bool, dict[int, _Clip]] = {False: {}, True: {}}
        for i, request in requests.items():
            clip = read[request.data, request.frames]
            if isinstance(clip, MediaError):
                results[i] = clip
            else:
                clips[clip.is_packets][i] = clip
        for packets, group in clips.items():
            if group:
                results |= self._transform(packets, group, requests)
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

    def _transform(
        self, packets: bool, clips: dict[int, _Clip], requests: dict[int, DecodeRequest]
    ) -> dict[int, torch.Tensor | MediaError]:
        """Runs a graph; where packets fail, runs each clip alone to find the broken ones."""
        try:
            tensors = self._graphs[packets].run(list(clips.values()), [requests[i] for i in clips])
        except _GraphError as error:
            if not packets:
                raise
            if len(clips) == 1:
                return {i: MediaError(f"the video decoder failed: {error.cause}") for i in clips}
            return {i: out for j in clips for i, out in self._transform(packets, {j: clips[j]}, requests).items()}
        return dict(zip(clips, tensors, strict=True))
