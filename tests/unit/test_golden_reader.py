"""Golden cases that the shared folder does not hold, written by hand: what the reader must make of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_lance.config.schema import ModelConfig, ObjectiveConfig
from megatron_lance.packing.sample import Task
from megatron_lance.packing.segment import Segment, SegmentKind
from megatron_lance.parity.golden import GoldenCase, GoldenConfig, GoldenError, case_files, load_case, load_config

HIDDEN, CHANNELS, SHIFT = 4, 2, 3.0
IDS = {"<|endoftext|>": 90, "<|im_start|>": 91, "<|im_end|>": 92, "<|vision_start|>": 93, "<|vision_end|>": 94}
SPECIAL = IDS | {"<|video_pad|>": 97}
CONFIG = GoldenConfig(
    ModelConfig(hidden_size=HIDDEN, latent_channels=CHANNELS), ObjectiveConfig(timestep_shift=SHIFT), 98, SPECIAL
)
MODES = {"vit": "full", "clean": "full_noise", "noise": "noise", "text": "causal"}

Entry = tuple[str, Any]
"""(kind, ids) for text and its variants, (kind, (t, h, w)) for blocks; kinds below."""


@dataclass
class Writer:
    """A case in the recorder's format, sample by sample.

    Kinds: text, vit, clean, noise are in the plan and in the batch; a kind with `-dropped` is in the plan only;
    text-emptied leaves its delimiters in the batch.  `answer` is a text with loss.
    """

    samples: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    splits: list[tuple[int, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    media: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=lambda: {"vit": [], "vae": []})
    contents: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"vit": [], "vae": []})

    def piece(self, mode: str, ids: list[int]) -> None:
        self.splits.append((len(ids), mode))
        self.ids += ids

    def block(self, kind: str, grid: tuple[int, int, int], key: str) -> None:
        t, h, w = grid
        width = HIDDEN if kind == "vit" else CHANNELS
        # every item has values of its own, so that a wrong choice shows
        value = torch.full((t * h * w, width), float(len(self.media) + 1)) + torch.arange(t * h * w)[:, None] / 64
        self.media[key] = value if kind == "vit" else value.reshape(t, h, w, width)

    def keep(self, kind: str, key: str) -> None:
        which, content = ("vit" if kind == "vit" else "vae"), self.media[key].flatten(end_dim=-2)
        start = len(self.ids) + 1
        self.rows[which] += range(start, start + len(content))
        self.contents[which].append(content)
        pads = [SPECIAL["<|video_pad|>"]] * len(content)
        self.piece(MODES[kind], [SPECIAL["<|vision_start|>"], *pads, SPECIAL["<|vision_end|>"]])

    def add(self, task: str, entries: list[Entry], **extra: Any) -> Writer:
        """A sample without the template; `extra` goes into its noise entries."""
        before = len(self.ids)
        raw: dict[str, Any] = {"sample_task": task, "sequence_plan": [], "text_ids_list": [], "visual_items": []}
        for name, value in entries:
            kind, _, fate = name.partition("-")
            if kind in ("text", "answer"):
                raw["sequence_plan"].append({"type": "text", "enable_cfg": 1, "loss": int(kind == "answer")})
                raw["text_ids_list"].append(value)
                if fate != "dropped":
                    body = [] if fate == "emptied" else value
                    self.piece("causal", [SPECIAL["<|im_start|>"], *body, SPECIAL["<|im_end|>"]])
                continue
            key = f"raw_media/{len(self.samples)}/{kind}/{len(self.media)}"
            self.block(kind, value, key)
            thw = [2 * value[0], 28 * value[1], 28 * value[2]] if kind == "vit" else None
            plan = {"type": "vit_video" if kind == "vit" else "vae_video", "loss": int(kind == "noise"), "thw": thw}
            plan["enable_cfg"] = int(kind != "noise")
            raw["sequence_plan"].append(plan | (extra if kind == "noise" else {}))
            raw["visual_items"].append({"key": key})
            if fate != "dropped":
                self.keep(kind, key)
        self.samples.append(raw)
        self.lengths.append(len(self.ids) - before)
        return self

    def load(self, folder: Path) -> GoldenCase:
        """Write the case with some tail padding and read it."""
        tensors = dict(self.media)
        tensors["in/packed_text_ids"] = torch.tensor(self.ids)
        for which, names in (
            ("vit", ("in/packed_vit_token_indexes", "in/packed_vit_tokens_cat")),
            ("vae", ("in/packed_vae_token_indexes", "in/clean_latent_tokens")),
        ):
            if self.rows[which]:
                tensors[names[0]], tensors[names[1]] = torch.tensor(self.rows[which]), torch.cat(self.contents[which])
        count = len(self.rows["vae"])
        if count:
            tensors["in/packed_timesteps"] = torch.zeros(count)
            tensors["out/noise"] = torch.arange(count * CHANNELS).reshape(count, CHANNELS).float()
        raw = {
            "samples": self.samples,
            "sample_lens": [*self.lengths, 7],
            "split_lens": [*(length for length, _ in self.splits), 7],
            "attn_modes": [*(mode for _, mode in self.splits), "causal"],
        }
        save_file(tensors, folder / "case1.safetensors")
        (folder / "case1.json").write_text(json.dumps(raw))
        return load_case(folder / "case1.json", CONFIG)


def kinds(case: GoldenCase) -> list[str]:
    return [p.segment.kind.value for p in case.pack.placed_segments()]


def first_values(rows: torch.Tensor) -> list[float]:
    """The number of the media item (counted from 1) that each row came from."""
    return rows[:, 0].floor().unique_consecutive().tolist()


def test_plain_generation(tmp_path: Path) -> None:
    case = Writer().add("t2v", [("text", [5, 6, 7]), ("noise", (1, 2, 2))]).load(tmp_path)
    (sample,) = case.pack.samples
    assert sample.task is Task.T2I and case.pack.ce_rows == 0
    assert sample.segments == (Segment.text(5), Segment.visual(SegmentKind.NOISE, (1, 2, 2)))
    assert case.tokens.token_ids.tolist() == [91, 5, 6, 7, 92, 93, 97, 97, 97, 97, 94]
    assert case.noise.timesteps.tolist() == [0.75] * 4, "sigmoid(0) = 0.5, shifted by 3"
    assert case.noise.noise[:, 0].tolist() == [0, 2, 4, 6]


def test_plain_understanding_learns_body_and_end(tmp_path: Path) -> None:
    """The delimiter before the body predicts its first token; the last label is im_end."""
    case = Writer().add("t2v", [("vit", (1, 1, 2)), ("answer", [5, 6])]).load(tmp_path)
    assert case.pack.samples[0].task is Task.I2T
    assert case.tokens.ce_labels.tolist() == [5, 6, 92]
    assert case.tokens.token_ids[case.tokens.ce_rows].tolist() == [91, 5, 6]


def test_a_dropped_caption_is_gone(tmp_path: Path) -> None:
    case = Writer().add("t2v", [("text-dropped", [5, 6]), ("noise", (1, 1, 1))]).load(tmp_path)
    assert kinds(case) == ["noise"] and case.tokens.token_ids.tolist() == [93, 97, 94]


def test_a_dropped_caption_may_leave_its_delimiters(tmp_path: Path) -> None:
    case = Writer().add("t2v", [("text-emptied", [5, 6]), ("noise", (1, 1, 1))]).load(tmp_path)
    assert kinds(case) == ["text", "noise"] and case.tokens.token_ids.tolist() == [91, 92, 93, 97, 94]


def test_of_two_captions_the_dropped_one_is_gone(tmp_path: Path) -> None:
    """They are equally long; only their content tells them apart."""
    case = Writer().add("t2v", [("text-dropped", [5, 6]), ("text", [7, 8]), ("noise", (1, 1, 1))]).load(tmp_path)
    assert case.tokens.token_ids.tolist() == [91, 7, 8, 92, 93, 97, 94]


def test_a_dropped_condition_is_gone_with_its_media(tmp_path: Path) -> None:
    entries = [("vit-dropped", (1, 1, 2)), ("clean-dropped", (1, 2, 2)), ("text", [5]), ("noise", (1, 2, 2))]
    case = Writer().add("edit", entries).load(tmp_path)
    assert kinds(case) == ["text", "noise"] and case.pack.samples[0].task is Task.I_EDIT
    assert case.visuals.vit.shape == (0, HIDDEN) and first_values(case.visuals.latents) == [3]
    assert len(case.visuals.valid) == 1


def test_vit_and_clean_block_are_dropped_each_on_its_own(tmp_path: Path) -> None:
    entries = [("vit-dropped", (1, 1, 2)), ("clean", (1, 1, 2)), ("text", [5]), ("noise", (1, 1, 2))]
    case = Writer().add("edit", entries).load(tmp_path)
    assert kinds(case) == ["clean", "text", "noise"] and first_values(case.visuals.latents) == [2, 3]


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_of_equally_large_references_the_right_one_is_gone(dropped: int, tmp_path: Path) -> None:
    entries: list[Entry] = []
    for index in range(3):
        fate = "-dropped" if index == dropped else ""
        entries += [(f"vit{fate}", (1, 1, 1)), (f"clean{fate}", (1, 1, 2))]
    case = Writer().add("idip", [*entries, ("text", [5]), ("noise", (1, 1, 2))]).load(tmp_path)
    left = [i for i in range(3) if i != dropped]
    assert kinds(case) == ["vit", "clean"] * 2 + ["text", "noise"]
    assert first_values(case.visuals.vit) == [2 * i + 1 for i in left]
    assert first_values(case.visuals.latents) == [*(2 * i + 2 for i in left), 7]


@pytest.mark.parametrize("task", ["idip", "maze"])
def test_several_references_of_different_sizes(task: str, tmp_path: Path) -> None:
    entries = [("vit", (1, 1, 2)), ("clean", (1, 2, 2)), ("vit", (1, 2, 2)), ("clean", (1, 1, 3)), ("text", [5])]
    case = Writer().add(task, [*entries, ("noise", (1, 2, 2))]).load(tmp_path)
    (sample,) = case.pack.samples
    assert sample.task is Task.S2I
    assert [s.grid for s in sample.segments] == [(1, 1, 2), (1, 2, 2), (1, 2, 2), (1, 1, 3), None, (1, 2, 2)]
    assert first_values(case.visuals.vit) == [1, 3] and first_values(case.visuals.latents) == [2, 4, 5]
    assert case.noise.loss_rows.tolist() == [False] * 7 + [True] * 4
    assert not case.noise.timesteps[:7].any()


def test_samples_of_a_pack_are_told_apart(tmp_path: Path) -> None:
    writer = Writer().add("t2v", [("text-dropped", [5]), ("noise", (2, 1, 1))])
    writer.add("t2v", [("vit", (1, 1, 1)), ("answer", [6, 7])]).add(
        "edit", [("clean", (1, 1, 1)), ("noise", (1, 1, 1))]
    )
    case = writer.load(tmp_path)
    assert [s.task for s in case.pack.samples] == [Task.T2V, Task.I2T, Task.I_EDIT]
    assert kinds(case) == ["noise", "vit", "text", "clean", "noise"]
    assert first_values(case.visuals.latents) == [1, 3, 4] and first_values(case.visuals.vit) == [2]


@pytest.mark.parametrize(
    ("frames", "wanted", "clean"),
    [
        (3, [0], (0,)),
        (3, [0, -1], (0, 2)),
        (2, [0, -1], (0,)),  # the reference leaves a last frame alone that is frame 1
        (1, [0], (0,)),
        (3, [], ()),
        (3, None, ()),
    ],
)
def test_frame_conditions(frames: int, wanted: list[int] | None, clean: tuple[int, ...], tmp_path: Path) -> None:
    extra = {} if wanted is None else {"frame_condition_idx": wanted}
    case = Writer().add("t2v", [("text", [5]), ("noise", (frames, 1, 2))], **extra).load(tmp_path)
    (sample,) = case.pack.samples
    assert sample.segments[1].clean_frames == clean
    assert sample.task is (Task.I2V if clean else Task.T2V)
    per_frame = case.noise.loss_rows.reshape(frames, 2)
    assert per_frame.all(1).tolist() == [f not in clean for f in range(frames)]
    assert not case.noise.timesteps[~case.noise.loss_rows].any()
    assert case.noise.timesteps[case.noise.loss_rows].all()


@pytest.mark.parametrize("task", ["refedit", "t2v"])
def test_a_clean_block_without_a_position_rule_is_refused(task: str, tmp_path: Path) -> None:
    writer = Writer().add(task, [("clean", (1, 1, 2)), ("text", [5]), ("noise", (1, 1, 2))])
    with pytest.raises(GoldenError, match=f"sample_task '{task}' with a clean VAE block"):
        writer.load(tmp_path)


def test_two_templates_are_refused(tmp_path: Path) -> None:
    writer = Writer().add("t2v", [("text", [5, 6])])
    template = {"type": "text_template", "loss": 0, "spans_index": [], "packed_label_index": []}
    writer.samples[0]["sequence_plan"] = [template, template]
    with pytest.raises(GoldenError, match="sample 0: 2 text_template entries; one is defined"):
        writer.load(tmp_path)


def test_pieces_that_no_entry_explains_are_refused(tmp_path: Path) -> None:
    writer = Writer().add("t2v", [("text", [5, 6]), ("noise", (1, 1, 1))])
    writer.samples[0]["text_ids_list"] = [[5, 7]]
    with pytest.raises(GoldenError, match="sample 0: pieces .* match no entry of the sequence plan"):
        writer.load(tmp_path)


def test_a_template_holds_blocks_where_its_spans_say(tmp_path: Path) -> None:
    """Text, a block, text, a block, text; labels only with loss; the caption span is kept."""
    writer = Writer().add("edit", [("clean", (1, 1, 2)), ("noise", (1, 1, 1))])
    sample = writer.samples[0]
    ids = [91, 1, 93, 97, 97, 94, 2, 3, 93, 97, 94, 92]
    template = {"type": "text_template", "loss": 0, "spans_index": [[3, 4], [9]], "packed_label_index": [9, 10, 11]}
    sample["sequence_plan"].append(template | {"cap_index": [6, 7]})
    sample["text_ids_list"] = [ids]
    writer.ids, writer.lengths = ids, [12]
    writer.splits = [(2, "causal"), (4, "full_noise"), (2, "causal"), (3, "noise"), (1, "causal")]
    writer.rows["vae"] = [3, 4, 9]
    case = writer.load(tmp_path)
    (got,) = case.pack.samples
    assert kinds(case) == ["text", "clean", "text", "noise", "text"] and got.length == 12
    assert got.label_spans == () and got.caption_span == (6, 8)
    assert case.tokens.token_ids.tolist() == ids


def test_folders_without_cases_are_named(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="has no config.json"):
        load_config(tmp_path)
    (tmp_path / "case1.json").write_text("{}")
    with pytest.raises(GoldenError, match="no case.*json with its .safetensors"):
        case_files(tmp_path)


def test_cases_come_by_number(tmp_path: Path) -> None:
    for name in ("case10_b", "case2_a", "case1_t2i", "sampling_case1"):
        for suffix in (".json", ".safetensors"):
            (tmp_path / f"{name}{suffix}").write_text("")
    (tmp_path / "case3.json").write_text("")  # without tensors
    assert [p.stem for p in case_files(tmp_path)] == ["case1_t2i", "case2_a", "case10_b"]
