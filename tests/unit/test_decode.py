"""Decoding: golden pixels, frames matched by timestamp, broken media contained, the order of results proven."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image
from safetensors.torch import load_file

from megatron_lance.data import media
from megatron_lance.data.decode import (
    NORMALIZATION,
    DecodeRequest,
    MediaDecoder,
    MediaError,
    MediaInfo,
    _Clip,
    _Graph,
    probe,
)
from megatron_lance.data.sizes import bucket_size, crop_window, sample_frames, vae_size, vit_size
from tests.shared import shared_path

MEAN_TOLERANCE, P999_TOLERANCE = 0.005, 0.04  # of pixels on a 0..1 scale


@pytest.fixture(scope="module")
def decoder() -> MediaDecoder:
    return MediaDecoder("host", threads=2)


def rows(name: str) -> list[dict[str, Any]]:
    return pq.read_table(shared_path("data", name)).to_pylist()


def request(data: bytes, frames: tuple[int, ...], width: int, height: int, resolution: int, tag: str) -> DecodeRequest:
    size = {"vae": vae_size, "vit": vit_size}[tag](width, height, resolution)
    return DecodeRequest(data, frames, bucket_size(width, height, resolution), size, tag)


def small(data: bytes, frames: tuple[int, ...] = ()) -> DecodeRequest:
    return DecodeRequest(data, frames, (64, 96), (64, 96), "vae")


def reference(frames: np.ndarray, asked: DecodeRequest) -> torch.Tensor:
    """The exact path, by PIL: uint8 [F, H, W, 3] -> float32 [3, F, h, w]."""
    (bucket_h, bucket_w), (height, width) = asked.bucket, asked.size
    top, left, crop_h, crop_w = crop_window(frames.shape[2], frames.shape[1], asked.bucket)
    y, x = (bucket_h - height) // 2, (bucket_w - width) // 2
    out = []
    for frame in frames:
        picture = Image.fromarray(frame).crop((left, top, left + crop_w, top + crop_h))
        resized = np.asarray(picture.resize((bucket_w, bucket_h), Image.Resampling.BICUBIC))
        out.append(resized[y : y + height, x : x + width])
    pixels = torch.from_numpy(np.stack(out)).permute(3, 0, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in NORMALIZATION[asked.normalize])
    return (pixels - mean) / std


def assert_close(result: torch.Tensor | MediaError, expected: torch.Tensor, asked: DecodeRequest) -> None:
    assert isinstance(result, torch.Tensor), result
    assert result.shape == expected.shape and result.dtype == torch.float32
    std = torch.tensor(NORMALIZATION[asked.normalize][1]).view(3, 1, 1, 1)
    difference = ((result - expected) * std).abs().flatten()
    assert difference.mean() <= MEAN_TOLERANCE
    assert np.quantile(difference.numpy(), 0.999) <= P999_TOLERANCE


def picture(i: int, width: int = 96, height: int = 64) -> np.ndarray:
    """uint8 [H, W, 3]; the brightness tells the frame."""
    y, x = np.mgrid[:height, :width]
    return np.stack([(x + i * 5) % 256, (y + i * 5) % 256, np.full_like(x, i * 5 % 256)], axis=-1).astype(np.uint8)


def encode_image(image: Image.Image, format_: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def encode_clip(codec: str, format_: str, n: int = 40, shift: int = 0, options: dict[str, str] | None = None) -> bytes:
    """A clip of `n` pictures, its timestamps moved back by `shift` frames (an edit list hides the negative ones)."""
    file = io.BytesIO()
    with av.open(file, "w", format=format_) as output:
        stream: Any = output.add_stream(codec, rate=24, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(picture(i), format="rgb24").reformat(format="yuv420p") for i in range(n)]
        for i, frame in enumerate([*frames, None]):
            if frame is not None:
                frame.pts = i
            for packet in stream.encode(frame):
                packet.pts -= shift
                packet.dts -= shift
                output.mux(packet)
    return file.getvalue()


def decode_all(data: bytes, **options: str) -> np.ndarray:
    """Every frame from the beginning, uint8 [F, H, W, 3]."""
    with av.open(io.BytesIO(data), "r", options=options) as container:
        return np.stack([media._frame_to_rgb(frame, VideoReformatter()) for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def vp9() -> bytes:
    return encode_clip("libvpx-vp9", "webm", options={"g": "16"})


def golden_transforms() -> Iterator[tuple[DecodeRequest, np.ndarray, torch.Tensor]]:
    tensors = load_file(shared_path("golden", "transforms.safetensors"))
    for shape in json.loads(shared_path("golden", "transforms.json").read_text())["shapes"]:
        pixels = tensors[f"in/{shape['i']}/hwc_uint8"].numpy()
        height, width = shape["in_hw"]
        data = encode_image(Image.fromarray(pixels), "PNG")
        asked = request(data, (), width, height, shape["resolution"], shape["tag"])
        yield asked, pixels[None], tensors[f"{shape['tag']}/{shape['i']}/out_cthw"]


def test_the_reference_of_these_tests_gives_the_golden_pixels() -> None:
    for asked, pixels, expected in golden_transforms():
        torch.testing.assert_close(reference(pixels, asked), expected, rtol=0, atol=1e-5)


def test_golden_pixels_in_one_call_of_mixed_sizes(decoder: MediaDecoder) -> None:
    cases = list(golden_transforms())
    assert len(cases) == 10
    for (asked, _, expected), result in zip(cases, decoder([c[0] for c in cases]), strict=True):
        assert_close(result, expected, asked)


def test_real_clips_and_pictures_at_both_sizes(decoder: MediaDecoder) -> None:
    clips = [row["video_bytes"] for row in rows("text2video.parquet")]
    pictures = [row["image_bytes"] for row in rows("text2image.parquet")]
    asked = []
    for data in [*clips, *pictures]:
        info = probe(data)
        frames = sample_frames(info.n_frames, info.average_fps, 12, 2) if info.kind == "video" else (0,)
        asked += [request(data, frames, info.width, info.height, r, tag) for r, tag in ((256, "vae"), (224, "vit"))]
    for one, result in zip(asked, decoder(asked), strict=True):
        assert_close(result, reference(media.read_frames(one.data, one.frames), one), one)


def test_every_parquet_row_with_media_can_be_probed() -> None:
    for name in ("image2image", "video2video", "x2t_image", "x2t_video", "text2image", "text2video"):
        for row in rows(f"{name}.parquet"):
            for column in (c for c in row if c.endswith("_bytes")):
                info = probe(row[column])
                assert info.kind == ("image" if "image" in column else "video")
                assert info.n_frames == 1 if info.kind == "image" else info.n_frames > 1 and info.average_fps > 0


def test_bad_rows_are_refused_with_their_cause_and_the_good_one_survives(decoder: MediaDecoder) -> None:
    bad = {row["caption"]: row["video_bytes"] for row in rows("bad_text2video.parquet")}
    causes = {"truncated mp4": "no moov atom", "empty bytes": "no bytes", "not a video": "unreadable or broken video"}
    for caption, cause in causes.items():
        with pytest.raises(MediaError, match=cause):
            probe(bad[caption])
    results = dict(zip(bad, decoder([small(data, (0, 5)) for data in bad.values()]), strict=True))
    causes |= {"jpeg where a video is expected": "single JPEG image", "one-frame video": "a clip of 1"}
    for caption, cause in causes.items():
        assert isinstance(results[caption], MediaError) and cause in str(results[caption])
    assert isinstance(results["a good clip among bad ones"], torch.Tensor)
    assert probe(bad["jpeg where a video is expected"]).kind == "image"
    one_frame = probe(bad["one-frame video"])
    with pytest.raises(ValueError, match="too short"):
        sample_frames(one_frame.n_frames, one_frame.average_fps, 12, 6)
    # Its index lies in a `free` atom, which FFmpeg recognises: the clip is whole and decodes to the original's frames.
    original = rows("text2video.parquet")[1]["video_bytes"]
    np.testing.assert_array_equal(
        media.read_frames(bad["moov atom missing"], (0, 92)), media.read_frames(original, (0, 92))
    )


@pytest.mark.parametrize(
    ("codec", "format_", "options"),
    [
        ("libx264", "mp4", {"g": "8", "bf": "2"}),
        ("libx264", "matroska", {"g": "8", "bf": "2", "x264-params": "open-gop=1"}),
        ("libx265", "mp4", {"x265-params": "log-level=none:keyint=8"}),
        ("libvpx-vp9", "webm", {"g": "8"}),
        ("mpeg4", "mp4", {"g": "8", "bf": "2"}),
    ],
)
def test_cut_reading_gives_the_frames_of_full_decoding(codec: str, format_: str, options: dict[str, str]) -> None:
    data = encode_clip(codec, format_, options=options)
    every = decode_all(data)
    assert probe(data) == MediaInfo("video", 96, 64, 40, 24.0)
    for frames in [(i,) for i in range(40)] + [(0, 39), (20, 3, 20, 31)]:
        np.testing.assert_array_equal(media.read_frames(data, frames), every[list(frames)])
    for frames in ((5,), (20, 3, 20), (33, 39)):
        cut = media.cut_packets(data, frames)
        assert len(cut.data) < len(data) or 3 in frames
        np.testing.assert_array_equal(decode_all(cut.data.tobytes())[list(cut.frames)], every[list(frames)])


def test_frames_hidden_by_an_edit_list_do_not_count() -> None:
    data = encode_clip("libx264", "mp4", shift=6, options={"g": "8", "bf": "2"})
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == 40  # what the header claims
    assert probe(data).n_frames == 34
    every = decode_all(data, ignore_editlist="1")
    assert len(every) == 40
    np.testing.assert_array_equal(media.read_frames(data, (0, 33)), every[[6, 39]])
    with pytest.raises(MediaError, match="a clip of 34"):
        media.read_frames(data, (34,))


def test_a_title_that_is_no_utf_8_does_no_harm() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        container.metadata["title"] = "cafeteria"
        stream = container.add_stream("libx264", rate=12)
        stream.width = stream.height = 64
        container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode())
    data = file.getvalue().replace(b"cafeteria", b"caf\xe9teria")
    assert (
        b"caf\xe9teria" in data and probe(data).n_frames == 1 and media.read_frames(data, (0,)).shape == (1, 64, 64, 3)
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_png_of_any_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(picture(30)).convert(mode)
    result = media.read_frames(encode_image(image, "PNG"), (0,))
    np.testing.assert_array_equal(result[0], np.asarray(image.convert("RGB")))


def test_alpha_is_composed_on_white_and_16_bit_grey_is_scaled() -> None:
    pixels = np.full((8, 8, 4), (200, 100, 0, 255), np.uint8)
    pixels[:4, :, 3], pixels[0, :, 3] = 0, 51  # a fifth of the colour
    for format_ in ("PNG", "WEBP"):
        data = encode_image(Image.fromarray(pixels), format_, **({"lossless": True} if format_ == "WEBP" else {}))
        result = media.read_frames(data, ())[0]
        assert result[1:4].min() == 255 and (result[4:] == (200, 100, 0)).all()
        np.testing.assert_allclose(result[0].astype(int), np.broadcast_to((244, 224, 204), (8, 3)), atol=1)
    palette = Image.new("P", (8, 8), 0)
    assert (media.read_frames(encode_image(palette, "PNG", transparency=0), ()) == 255).all()
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    assert (media.read_frames(encode_image(Image.fromarray(grey), "PNG"), ())[0] == (grey >> 8)[..., None]).all()
    cmyk = Image.fromarray(np.full((16, 16, 3), 128, np.uint8)).convert("CMYK")
    np.testing.assert_allclose(media.read_frames(encode_image(cmyk, "JPEG"), ()).astype(int), 128, atol=2)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_truncated_pictures_are_refused(format_: str) -> None:
    data = encode_image(Image.fromarray(picture(3)), format_)
    for read in (probe, lambda d: media.read_frames(d, ())):
        with pytest.raises(MediaError, match="image"):
            read(data[: len(data) // 2])


def test_a_small_file_of_huge_frames_is_refused(monkeypatch: pytest.MonkeyPatch, vp9: bytes) -> None:
    monkeypatch.setattr(media, "MAX_PIXELS", 96 * 64 - 1)
    for use in (media.probe, lambda data: media.read_frames(data, (0,)), lambda data: media.cut_packets(data, (0,))):
        with pytest.raises(MediaError, match="the video is of 96x64, more than 6143 pixels"):
            use(vp9)


def test_a_file_that_only_plays_other_files_is_refused() -> None:
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://localhost/a.ts\n#EXT-X-ENDLIST\n"
    with pytest.raises(MediaError, match="unreadable"):
        probe(playlist)


def test_results_keep_the_order_over_several_batches_and_bad_requests_stay_alone(
    decoder: MediaDecoder, vp9: bytes
) -> None:
    still = encode_image(Image.fromarray(picture(9)), "PNG")
    asked = []
    for i in range(0, 36, 4):
        asked += [small(vp9, (i, i + 1)), small(still), small(vp9[:200], (0,)), small(vp9, (i, 99)), small(vp9)]
    every = decode_all(vp9)
    for one, result in zip(asked, decoder(asked), strict=True):
        if one.data is still:
            assert_close(result, reference(picture(9)[None], one), one)
        elif one.data is vp9 and len(one.frames) == 2 and 99 not in one.frames:
            assert_close(result, reference(every[list(one.frames)], one), one)
        else:
            assert isinstance(result, MediaError), one.frames
    assert decoder([]) == []


def test_results_survive_later_calls(decoder: MediaDecoder, vp9: bytes) -> None:
    (first,) = decoder([small(vp9, (0, 1))])
    assert isinstance(first, torch.Tensor)
    kept = first.clone()
    for i in range(2, 8):
        decoder([small(vp9, (i, i + 1))])
    assert torch.equal(first, kept)


@pytest.fixture
def colours_as_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames become RGB as in DALI's own CPU decoder, so that both graphs must agree bit for bit."""
    exact = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
    monkeypatch.setattr(media, "_INTERPOLATION", exact)


@pytest.mark.usefixtures("colours_as_dali")
def test_the_graph_over_packets_gives_the_pixels_of_the_graph_over_frames(decoder: MediaDecoder, vp9: bytes) -> None:
    on_packets = MediaDecoder("host", threads=2)
    on_packets.reader._cut = True  # DALI's own CPU decoder, which still reads VP9, stands where NVDEC does
    still = encode_image(Image.fromarray(picture(9)), "PNG")
    asked = [small(vp9, (0, 4, 39)), small(still), small(vp9, (20, 3, 20)), small(vp9, (17,))]
    for result, expected in zip(on_packets(asked), decoder(asked), strict=True):
        assert isinstance(result, torch.Tensor) and isinstance(expected, torch.Tensor)
        assert torch.equal(result, expected)


@pytest.mark.usefixtures("colours_as_dali")
def test_a_clip_that_breaks_the_graph_over_packets_stays_alone(decoder: MediaDecoder, vp9: bytes) -> None:
    broken = bytearray(vp9)
    with av.open(io.BytesIO(vp9), "r") as container:
        for packet in list(container.demux(video=0))[:16]:
            at = vp9.find(bytes(packet))
            broken[at : at + packet.size] = b"\xff" * packet.size
    on_packets = MediaDecoder("host", threads=2)
    on_packets.reader._cut = True
    asked = [small(vp9, (0, 1)), small(bytes(broken), (0, 4)), small(vp9, (30, 2))]
    for _ in range(2):  # the pipeline is built anew and stays right
        first, second, third = on_packets(asked)
        assert isinstance(second, MediaError) and "Failed to send packet to decoder" in str(second)
        for result, expected in zip((first, third), decoder([asked[0], asked[2]]), strict=True):
            assert isinstance(result, torch.Tensor) and isinstance(expected, torch.Tensor)
            assert torch.equal(result, expected)


def graph_and_inputs() -> tuple[_Graph, list[_Clip], list[tuple[tuple[int, int], tuple[int, int]]]]:
    clips = [_Clip(picture(i)[None], (0,), width=96, height=64) for i in range(2)]
    return _Graph(packets=False, batch_size=2, threads=1, device_id=None), clips, [((64, 96), (64, 96))] * 2


def test_the_graph_is_rebuilt_after_an_error() -> None:
    graph, clips, asked = graph_and_inputs()
    beyond = ((64, 96), (128, 96))  # a crop larger than the picture
    for _ in range(2):
        before = graph.run(clips, asked)
        with pytest.raises(RuntimeError, match="crop|bounds"):
            graph.run(clips, [beyond, asked[1]])
        after = graph.run(clips, asked)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_shifted_samples_are_noticed() -> None:
    graph, clips, asked = graph_and_inputs()
    graph.run(clips, asked)
    assert graph._pipeline is not None
    graph._pipeline.feed_input("tag", [np.array([-1], np.int64)] * 2)  # what a left-over batch would do
    with pytest.raises(RuntimeError, match=r"samples \[-1, -1\]"):
        graph.run(clips, asked)
    one = small(b"unused")
    assert_close(graph.run(clips, asked)[1] / 127.5 - 1, reference(picture(1)[None], one), one)


def test_impossible_settings_and_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="'gpu'"):
        MediaDecoder("gpu", 2)
    with pytest.raises(ValueError, match="decode_threads 0"):
        MediaDecoder("host", 0)
    with pytest.raises(ValueError, match="NVDEC needs a GPU"):
        MediaDecoder("mixed", 2)
    with pytest.raises(ValueError, match="normalize 'rgb'"):
        DecodeRequest(b"", (), (64, 64), (64, 64), "rgb")
    with pytest.raises(ValueError, match="fit into bucket"):
        DecodeRequest(b"", (), (64, 64), (80, 64), "vae")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NVDEC needs a GPU, and there is none")
def test_mixed_decoding_agrees_with_host_decoding(decoder: MediaDecoder) -> None:
    mixed = MediaDecoder("mixed", threads=2, device_id=0)
    still = rows("text2image.parquet")[0]["image_bytes"]
    asked = [request(still, (), 690, 920, 256, "vae"), small(b"not a video", (0,))]
    for row in rows("text2video.parquet"):
        info = probe(row["video_bytes"])
        asked.append(request(row["video_bytes"], (40 % info.n_frames, 3, 9), info.width, info.height, 256, "vae"))
    for one, result, expected in zip(asked, mixed(asked), decoder(asked), strict=True):
        if isinstance(expected, MediaError):
            assert str(result) == str(expected)
        else:
            assert isinstance(result, torch.Tensor) and result.is_cuda
            assert_close(result.cpu(), expected, one)
