"""The sampler against its formulas, the files it writes, and its command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from megatron_lance.config.loader import load_config
from megatron_lance.data.decode import DecodeRequest, MediaDecoder
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.encoders.vae import build_vae
from megatron_lance.encoders.vit import VitEncoder
from megatron_lance.packing.sample import Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.sampling.flow_sampler import (
    Request,
    SamplerSettings,
    initial_noise,
    sample,
    timesteps,
    without_caption,
    without_conditions,
)
from megatron_lance.sampling.media import contact_sheet, shown_frames, to_frames, write_mp4, write_png
from megatron_lance.sampling.requests import Prompt, PromptError, PromptPlanner, RequestBuilder
from megatron_lance.sampling.text_decoder import DecoderSettings, Question, choose
from tests.command import Commander
from tests.tiny import TinyRun, jpeg, mp4
from tools.demo_shapes import Scene, caption, draw, random_scene

CHANNELS, HIDDEN = 3, 2


def request_of(name: str = "s", clean_frames: tuple[int, ...] = (), value: float = 7.0) -> Request:
    """Text of 6 tokens with caption 2 to 5, a noise block of 2 x 1 x 2 cells, one closing token."""
    block = Segment.visual(SegmentKind.NOISE, (2, 1, 2), clean_frames)
    shape = Sample(name, Task.T2V, (Segment.text(6), block, Segment.text(1)), (), (2, 5))
    return Request(shape, torch.arange(shape.length), torch.full((4, CHANNELS), value), torch.zeros(0, HIDDEN))


def test_times_run_from_noise_to_data_and_are_shifted() -> None:
    times = timesteps(4, 3.0)
    plain = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert times.tolist() == pytest.approx([3 * t / (1 + 2 * t) for t in plain])


def test_the_unconditional_branch_lacks_the_caption_alone() -> None:
    plain = without_caption(request_of())
    assert [s.length for s in plain.sample.segments] == [3, 6, 1] and plain.sample.caption_span is None
    assert plain.token_ids.tolist() == [0, 1, 5, 6, 7, 8, 9, 10, 11, 12]
    assert without_caption(plain) is plain


def test_a_straight_flow_is_sampled_exactly() -> None:
    """Where v = noise - data everywhere, Euler steps end on the data."""
    request = request_of()
    noise = initial_noise([request], CHANNELS, seed=1)
    data = torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(0))

    def velocity(requests: Sequence[Request], xs: Sequence[torch.Tensor], t: float) -> list[torch.Tensor]:
        return [noise[0] - data for _ in requests]

    (latent,) = sample([request], noise, velocity, SamplerSettings(steps=7, shift=3.5))
    assert latent.shape == (2, 1, 2, CHANNELS)
    torch.testing.assert_close(latent.reshape(4, CHANNELS), data, atol=1e-5, rtol=1e-5)


def test_frame_conditions_stay_as_they_were_given() -> None:
    request = request_of(clean_frames=(0,))
    noise = initial_noise([request], CHANNELS, seed=1)

    def velocity(requests: Sequence[Request], xs: Sequence[torch.Tensor], t: float) -> list[torch.Tensor]:
        assert all(torch.equal(x[:2], torch.full((2, CHANNELS), 7.0)) for x in xs)
        return [torch.ones(4, CHANNELS) for _ in requests]

    (latent,) = sample([request], noise, velocity, SamplerSettings(steps=3))
    assert torch.equal(latent[0], torch.full((1, 2, CHANNELS), 7.0))
    torch.testing.assert_close(latent[1].reshape(2, CHANNELS), noise[0][2:] - 1.0)


@pytest.mark.parametrize("renorm", ["global", "channel", "none"])
def test_guidance_and_its_renorm(renorm: str) -> None:
    """One step at t = 1: x1 = x0 - v, with v of the specification."""
    request = request_of()
    noise = initial_noise([request], CHANNELS, seed=2)
    c, u = (torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(s)) for s in (3, 4))

    def velocity(requests: Sequence[Request], xs: Sequence[torch.Tensor], t: float) -> list[torch.Tensor]:
        assert [r.sample.caption_span for r in requests] == [(2, 5), None]
        return [c, u]

    (latent,) = sample([request], noise, velocity, SamplerSettings(steps=1, scale=4.0, renorm=renorm))
    v = u + 4.0 * (c - u)
    if renorm == "global":
        v = v * min(float(c.norm() / (v.norm() + 1e-8)), 1.0)
    elif renorm == "channel":
        v = v * (c.norm(dim=-1, keepdim=True) / (v.norm(dim=-1, keepdim=True) + 1e-8)).clamp(max=1.0)
    torch.testing.assert_close(latent.reshape(4, CHANNELS), noise[0] - v)


def test_guidance_is_on_inside_its_interval_only() -> None:
    request, seen = request_of(), []

    def velocity(requests: Sequence[Request], xs: Sequence[torch.Tensor], t: float) -> list[torch.Tensor]:
        seen.append((round(t, 3), len(requests)))
        return [torch.zeros(4, CHANNELS) for _ in requests]

    sample([request], initial_noise([request], CHANNELS, 0), velocity, SamplerSettings(steps=5, shift=1.0))
    assert seen == [(1.0, 2), (0.8, 2), (0.6, 2), (0.4, 1), (0.2, 1)]
    seen.clear()
    sample([request], initial_noise([request], CHANNELS, 0), velocity, SamplerSettings(steps=2, scale=1.0))
    assert [count for _, count in seen] == [1, 1]


def test_noise_is_addressed_by_sample_and_seed() -> None:
    a, b = request_of("a"), request_of("b")
    together = initial_noise([a, b], CHANNELS, 0)
    assert torch.equal(together[1], initial_noise([b], CHANNELS, 0)[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], initial_noise([a], CHANNELS, 1)[0])


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="steps 0"):
        SamplerSettings(steps=0)
    with pytest.raises(ValueError, match="renorm 'all'"):
        SamplerSettings(renorm="all")


def edit_request() -> Request:
    """A condition's ViT (1 x 1 x 2) and clean (1 x 1 x 2) block, caption 11 to 13, a noise block of 1 x 1 x 3."""
    segments = (
        Segment.text(3),
        Segment.visual(SegmentKind.VIT, (1, 1, 2)),
        Segment.visual(SegmentKind.CLEAN, (1, 1, 2)),
        Segment.text(3),
        Segment.visual(SegmentKind.NOISE, (1, 1, 3)),
    )
    shape = Sample("edit", Task.I_EDIT, segments, (), (11, 13))
    return Request(shape, torch.arange(shape.length), torch.arange(5.0)[:, None].expand(5, CHANNELS), torch.ones(2, 2))


def test_the_branch_without_conditions_lacks_caption_and_visuals() -> None:
    request = edit_request()
    bare = without_conditions(without_caption(request))
    assert [(s.kind, s.length) for s in bare.sample.segments] == [
        (SegmentKind.TEXT, 3),
        (SegmentKind.TEXT, 1),
        (SegmentKind.NOISE, 5),
    ]
    assert bare.token_ids.tolist() == [0, 1, 2, 13, 14, 15, 16, 17, 18]
    assert bare.clean[:, 0].tolist() == [2.0, 3.0, 4.0] and len(bare.vit) == 0
    plain = without_caption(request_of())
    assert without_conditions(plain) is plain


def test_visual_guidance_has_its_own_scale() -> None:
    """V = v00 + s_text (v - v_plain) + s_visual (v_plain - v00); branches without conditions see noise rows alone."""
    request, generator = edit_request(), torch.Generator().manual_seed(1)
    noise = initial_noise([request], CHANNELS, seed=2)
    values = {5: torch.randn(5, CHANNELS, generator=generator), 3: torch.randn(3, CHANNELS, generator=generator)}
    plain_v = torch.randn(5, CHANNELS, generator=generator)

    def velocity(requests: Sequence[Request], xs: Sequence[torch.Tensor], t: float) -> list[torch.Tensor]:
        assert [len(x) for x in xs] == [5, 5, 3]
        assert torch.equal(xs[2], xs[0][2:])
        return [values[5], plain_v, values[3]]

    settings = SamplerSettings(steps=1, scale=3.0, visual_scale=2.0, renorm="none")
    (latent,) = sample([request], noise, velocity, settings)
    v = values[3] + 3.0 * (values[5] - plain_v)[2:] + 2.0 * (plain_v[2:] - values[3])
    torch.testing.assert_close(latent.reshape(3, CHANNELS), noise[0][2:] - v)


@pytest.fixture(scope="module")
def builder(tiny_run: TinyRun) -> RequestBuilder:
    run = load_config([str(tiny_run.config)], [])
    vit = VitEncoder.build(run.encoders, run.model.hidden_size, 1)
    vae = build_vae(run.encoders, run.model.latent_channels, 1)
    planner = PromptPlanner(run.data, Tokenizer(run.data.tokenizer))
    return RequestBuilder(planner, MediaDecoder("host", 1), vit, vae)


def kinds(request: Request | Question) -> list[str]:
    return [str(s.kind) for s in request.sample.segments if s.is_visual]


def test_requests_follow_the_chat_template(builder: RequestBuilder) -> None:
    prompts = builder.planner.data.prompts
    picture = builder.request(Prompt("p", Task.T2I, "a red car", size=(32, 48)))
    clip = builder.request(Prompt("c", Task.T2V, "a red car", size=(32, 48), frames=5))
    assert picture.target_grid == (1, 2, 3) and clip.target_grid == (2, 2, 3)
    for request, system in ((picture, prompts.generation_image_inference), (clip, prompts.generation)):
        text = builder.planner.tokenizer.decode(request.token_ids.tolist())
        assert text.startswith(f"<|im_start|>system\n{system.replace('{v}', 'video')}<|im_end|>\n<|im_start|>user\n")
        start, stop = request.sample.caption_span or (0, 0)
        assert builder.planner.tokenizer.decode(request.token_ids[start:stop].tolist()) == "a red car"
        assert request.sample.length == len(request.token_ids)


def test_requests_of_every_conditioned_task(builder: RequestBuilder) -> None:
    red, blue, film = jpeg("red"), jpeg("blue"), mp4("red")
    edit = builder.request(Prompt("e", Task.I_EDIT, "make it blue", (red,)))
    assert kinds(edit) == ["vit", "clean", "noise"]
    grids = [s.grid for s in edit.sample.segments if s.is_visual]
    assert grids[1] == grids[2], "an edit is as large as its source"
    assert edit.clean[: len(edit.clean) // 2].any() and len(edit.vit) == edit.sample.segments[1].content_length
    video = builder.request(Prompt("v", Task.V_EDIT, "make it blue", (film,)))
    assert kinds(video) == ["vit", "clean", "noise"] and video.target_grid[0] > 1
    subject = builder.request(Prompt("s", Task.S2I, "together", (red, blue), (32, 32)))
    assert kinds(subject) == ["vit", "clean", "vit", "clean", "noise"]
    first = builder.request(Prompt("f", Task.I2V, "it moves", (red,), (32, 32), 9))
    both = builder.request(Prompt("g", Task.I2V, "it moves", (red, blue), (32, 32), 9))
    assert kinds(first) == kinds(both) == ["noise"]
    assert (~first.target_rows).reshape(3, -1).all(dim=1).tolist() == [True, False, False]
    assert (~both.target_rows).reshape(3, -1).all(dim=1).tolist() == [True, False, True]
    frames = both.clean.reshape(3, -1)
    assert frames[0].any() and not frames[1].any() and frames[2].any() and not torch.equal(frames[0], frames[2])


def test_frame_conditions_are_encoded_as_training_has_them(builder: RequestBuilder) -> None:
    """Of a clip that stands still both conditions are the latent frames of the whole clip."""
    red = jpeg("red")
    both = builder.request(Prompt("g", Task.I2V, "it stands still", (red, red), (32, 32), 9))
    request = DecodeRequest(red, (0,), (32, 32), (32, 32), "vae")
    (picture,) = builder.decoder([request])
    assert isinstance(picture, torch.Tensor)
    clip = builder.vae.encode(picture.repeat(1, 9, 1, 1)).reshape(3, -1)
    rows = both.clean.reshape(3, -1)
    torch.testing.assert_close(rows[0], clip[0])
    torch.testing.assert_close(rows[2], clip[2])
    assert not torch.allclose(clip[2], builder.vae.encode(picture).flatten(), atol=1e-2)


def test_one_request_may_be_given_twice() -> None:
    """The same request with two noises is two samples."""
    request = edit_request()
    noise = initial_noise([request], CHANNELS, 1) + initial_noise([request], CHANNELS, 2)

    def velocity(requests: Sequence[Request], xs: Sequence[torch.Tensor], t: float) -> list[torch.Tensor]:
        return [torch.sin(x) for x in xs]

    settings = SamplerSettings(steps=2, visual_scale=2.0)
    together = sample([request, request], noise, velocity, settings)
    alone = [sample([request], [one], velocity, settings)[0] for one in noise]
    torch.testing.assert_close(together, alone)
    assert not torch.allclose(together[0], together[1])


def test_questions_end_where_the_answer_begins(builder: RequestBuilder) -> None:
    for task, media, blocks in ((Task.I2T, (jpeg("red"),), 1), (Task.V2T, (mp4("red"),), 1), (Task.T2T, (), 0)):
        question = builder.question(Prompt("q", task, "Which colour?", media))
        text = builder.planner.tokenizer.decode(question.token_ids.tolist())
        assert text.endswith("Which colour?<|im_end|>\n<|im_start|>assistant\n")
        assert len(kinds(question)) == blocks and question.sample.length == len(question.token_ids)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("x", Task.I_EDIT, "a"), "takes at least 1"),
        (Prompt("x", Task.T2I, "a", (jpeg("red"),), (32, 32)), "takes none"),
        (Prompt("x", Task.T2V, "a"), "needs a size and a number of frames"),
        (Prompt("x", Task.I2V, "a", (), (32, 32), 9), "has 0 media; i2v takes the first frame"),
        (Prompt("x", Task.I2V, "a", (jpeg("red"),), (32, 32), 1), "leave none to generate"),
        (Prompt("x", Task.I_EDIT, "a", (b"no picture",)), "x: medium 1 of 1"),
    ],
)
def test_prompts_that_do_not_fit_their_task(builder: RequestBuilder, prompt: Prompt, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        builder.request(prompt)


def test_tokens_are_chosen_greedily_or_from_the_likeliest() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, float("-inf"), 1.0])
    assert choose(logits, DecoderSettings(), 0, "a", 0) == 1
    drawn = [choose(logits, DecoderSettings(top_p=0.8), 0, "a", n) for n in range(200)]
    assert set(drawn) == {1, 2}, "0.64 + 0.24 of the mass"
    assert drawn == [choose(logits, DecoderSettings(top_p=0.8), 0, "a", n) for n in range(200)]
    assert drawn != [choose(logits, DecoderSettings(top_p=0.8), 0, "b", n) for n in range(200)]
    assert drawn != [choose(logits, DecoderSettings(top_p=0.8), 1, "a", n) for n in range(200)]
    assert 0.6 < drawn.count(1) / 200 < 0.85
    everything = {choose(logits, DecoderSettings(top_p=1.0, temperature=3.0), 0, "a", n) for n in range(300)}
    assert everything == {0, 1, 2, 4}
    with pytest.raises(ValueError, match="top_p 1.5"):
        DecoderSettings(top_p=1.5)


def test_files_keep_pixels_and_prompt(tmp_path: Path) -> None:
    ramp = torch.linspace(-1.5, 1.5, 32).expand(3, 9, 32, 32)
    frames = to_frames(ramp)
    assert frames.shape == (9, 32, 32, 3) and frames[0, 0, 0, 0] == 0 and frames[0, 0, -1, 0] == 255
    write_png(tmp_path / "a.png", frames[0], "ein Käfer")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["prompt"] == "ein Käfer"  # type: ignore[attr-defined]
        assert np.array_equal(np.asarray(picture), frames[0])
    write_mp4(tmp_path / "a.mp4", frames, 12.0, "a car")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["comment"] == "a car"
        decoded = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(decoded) == 9 and np.abs(decoded[4].astype(int) - frames[4]).mean() < 6
    shown = [shown_frames(tmp_path / name) for name in ("a.mp4", "a.png")]
    assert [len(s) for s in shown] == [3, 1]
    sheet = contact_sheet([(shown[0], "a long caption that has to be wrapped"), (shown[1], "short")], columns=2)
    assert sheet.width == 2 * (3 * 32 + 8) and sheet.height > 32 + 12


def test_a_contact_sheet_stays_small(tmp_path: Path) -> None:
    """Large pictures are reduced, and of a clip no more than three frames are kept."""
    write_mp4(tmp_path / "a.mp4", np.zeros((17, 480, 848, 3), np.uint8), 12.0, "x")
    frames = shown_frames(tmp_path / "a.mp4")
    assert frames.shape == (3, 145, 256, 3)
    words = "\u4e00" * 300  # no spaces to break at
    sheet = contact_sheet([(frames, words)], columns=8)
    assert sheet.width == 3 * 256 + 8 and sheet.height > 145 + 2 * 12


@pytest.fixture
def trained(command: Commander, tiny_run: TinyRun, tmp_path: Path) -> str:
    """Options of a run of one step and its export."""
    line = f"train --config {tiny_run.config} training.run_dir=run training.train_iters=1"
    assert command(line, folder=tmp_path).code == 0
    assert command("convert_checkpoint export-lance run out", folder=tmp_path).code == 0
    return f"--config {tmp_path}/run/config.yaml --weights {tmp_path}/out"


def test_sampling_from_an_export_and_judging(command: Commander, trained: str, tmp_path: Path) -> None:
    scenes = [random_scene(np.random.Generator(np.random.Philox(i)), moves=i == 1) for i in range(2)]
    rows = [
        {"task": task, "caption": caption(scene, 0), "expected": scene.attributes}
        for task, scene in zip(("t2i", "t2v"), scenes, strict=True)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = "--prompts prompts.jsonl --size 64x64 --frames 5 --steps 2 --batch 2"
    done = command(f"sample {trained} {options} --out samples", folder=tmp_path)
    assert done.code == 0, done.err
    written = [json.loads(line) for line in (tmp_path / "samples" / "samples.jsonl").read_text().splitlines()]
    assert [row["file"] for row in written] == ["0000.png", "0001.mp4"]
    assert (tmp_path / "samples" / "contact_sheet.png").is_file()
    again = command(f"sample {trained} {options} --out again --batch 1", folder=tmp_path)
    assert again.code == 0, again.err
    first, second = (np.asarray(Image.open(tmp_path / d / "0000.png")).astype(int) for d in ("samples", "again"))
    assert np.abs(first - second).max() <= 1  # the same sample whatever it is batched with

    judged = command("judge_demo samples --json score.json", folder=tmp_path)
    assert judged.code == 0 and "t2i: 1 held-out captions: colour" in judged.out, judged.err
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["t2v"]["samples"] == 1 and score["t2i"]["chance"]["colour"] == pytest.approx(1 / 6)


def test_the_judge_scores_what_it_sees(command: Commander, tmp_path: Path) -> None:
    scene: Scene = random_scene(np.random.Generator(np.random.Philox(5)), moves=False)
    folder = tmp_path / "samples"
    folder.mkdir()
    write_png(folder / "0000.png", draw(scene, 64, 1)[0], "x")
    wrong = {**scene.attributes, "colour": "red" if scene.attributes["colour"] != "red" else "blue"}
    write_png(folder / "0001.png", draw(scene, 64, 1)[0], "x")
    rows = [{"task": "t2i", "file": f"000{i}.png", "expected": e} for i, e in enumerate((scene.attributes, wrong))]
    (folder / "samples.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert command("judge_demo samples --json s.json", folder=tmp_path).code == 0
    right = json.loads((tmp_path / "s.json").read_text())["t2i"]["right"]
    assert right == {"colour": 0.5, "shape": 1.0, "position": 1.0, "all": 0.5}
    assert "has no samples.jsonl" in command("judge_demo .", folder=tmp_path).err


def test_mistakes_in_sampling(command: Commander, trained: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"caption": "a", "task": "t2i"}\n{"task": "t2i", "text": "b"}\n')
    (tmp_path / "task.jsonl").write_text('{"caption": "a", "task": "draw"}\n')
    (tmp_path / "absent.jsonl").write_text('{"caption": "a", "task": "i_edit", "image": "absent.png"}\n')
    (tmp_path / "turns.jsonl").write_text('{"caption": "a", "task": "t2i", "turns": ["b"]}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "taken").mkdir()
    for options, message in {
        "--prompt a --size 64 --out new": "--size '64': must be HxW",
        "--prompt a --size 60x64 --out new": "multiples of 16",
        "--prompt a --size 64x64 --frames 4 --out new": "--frames 4: must be 4k+1",
        "--prompt a --size 64x64 --frames 401 --out new": "exceeds the model's position table",
        "--prompt a --size 64x64 --out taken": "--out taken: exists",
        "--prompts nowhere.jsonl --size 64x64 --out new": "there is no such file",
        "--prompts bad.jsonl --size 64x64 --out new": "bad.jsonl line 2: has no text",
        "--prompts task.jsonl --size 64x64 --out new": "task.jsonl line 1: task 'draw': must be one of t2i",
        "--prompts absent.jsonl --size 64x64 --out new": "there is no file absent.png",
        "--prompts turns.jsonl --size 64x64 --out new": "turns belong to edits",
        "--prompts empty.jsonl --size 64x64 --out new": "is empty",
        "--prompt a --size 64x64 --out new data.tokenizer=''": "data.tokenizer '': is not set",
    }.items():
        outcome = command(f"sample {trained} {options}", folder=tmp_path)
        assert outcome.code == 2 and message in outcome.err, (options, outcome.err)
    assert not (tmp_path / "new").exists()
