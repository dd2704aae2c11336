"""Tasks: ids, segments, captions and labels of the goldens; condition dropout; what each task refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import pyarrow as pa
import pytest
from safetensors.torch import load_file

from megatron_lance.config.schema import DataConfig, ModelConfig, PromptConfig
from megatron_lance.data.facts import FACTS_SCHEMA, MediaFact, RowFacts, text_facts
from megatron_lance.data.media import MediaInfo
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.records import Media, Record, RecordError
from megatron_lance.data.sample_plan import Place, Sizing, plan_sample
from megatron_lance.data.tasks import Block, Dropout, assemble, draw_dropout, outline
from megatron_lance.packing.batch import PackTokens, label_rows
from megatron_lance.packing.packer import mask_pairs
from megatron_lance.packing.sample import Pack, Sample, Task
from megatron_lance.packing.segment import Segment, SegmentKind
from tests.shared import shared_path

GOLDENS = {
    "case1_t2i": [Task.T2I],
    "case2_t2v": [Task.T2V],
    "case3_i2t": [Task.I2T],
    "case4_edit": [Task.I_EDIT],
    "case6_packed": [Task.T2I, Task.T2V, Task.I2T, Task.I_EDIT, Task.S2I, Task.V2T],
    "case8_ff2v": [Task.I2V],
    "case15_i2t_caption": [Task.I2T],
}
MODES = {
    "causal": SegmentKind.TEXT,
    "full": SegmentKind.VIT,
    "full_noise": SegmentKind.CLEAN,
    "noise": SegmentKind.NOISE,
}
IMAGE = MediaInfo("image", 640, 480, 1, 0.0)
CLIP = MediaInfo("video", 640, 480, 48, 24.0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(shared_path("golden", "tokenizer"))


def golden_record(sample: dict[str, Any], task: Task) -> Record:
    """The record that a golden's text was made of."""
    turns = re.findall(r"<\|im_start\|>\w+\n(.*?)<\|im_end\|>", sample["decoded_text"][0], re.DOTALL)
    system, user, output = (re.sub(r"<\|vision_start\|>.*?<\|vision_end\|>", "", turn) for turn in turns)
    target_kind = "video" if task in (Task.T2V, Task.I2V) else "image"
    if task.is_generation:
        conditions = sum(plan["type"] == "vit_video" for plan in sample["sequence_plan"])
        media = [Media("image", f"input_{k}") for k in range(conditions)]
        return Record("golden", "file", 0, "", (*media, user), Media(target_kind, "target"))
    return Record("golden", "file", 0, system, (Media("image", "input_0"), user), output)


def golden_pack(case: str, tokenizer: Tokenizer) -> tuple[Pack, list[int], dict[str, Any]]:
    golden = json.loads(shared_path("golden", f"{case}.json").read_text())
    samples: list[Sample] = []
    ids: list[int] = []
    for i, (sample, task) in enumerate(zip(golden["samples"], GOLDENS[case], strict=True)):
        pieces = outline(golden_record(sample, task), task, PromptConfig(), Dropout())
        clean = [frame for p in sample["sequence_plan"] for frame in p.get("frame_condition_idx", [])]
        blocks = [piece for piece in pieces if isinstance(piece, Block)]
        visuals = [
            Segment.visual(b.kind, (t, h // 2, w // 2), tuple(clean) if b.kind is SegmentKind.NOISE else ())
            for b, (t, h, w) in zip(blocks, golden["video_grid_thw_per_sample"][i], strict=True)
        ]
        structure, token_ids = assemble(f"golden/{i}", task, pieces, visuals, tokenizer)
        samples.append(structure)
        ids += token_ids
    return Pack(tuple(samples), 4096), ids, golden


@pytest.mark.parametrize("case", GOLDENS)
def test_golden_token_ids(case: str, tokenizer: Tokenizer) -> None:
    pack, ids, golden = golden_pack(case, tokenizer)
    for start, sample, expected in zip(pack.sample_starts, pack.samples, golden["samples"], strict=True):
        assert ids[start : start + sample.length] == [i for part in expected["text_ids_list"] for i in part]


@pytest.mark.parametrize("case", GOLDENS)
def test_golden_segments(case: str, tokenizer: Tokenizer) -> None:
    pack, _, golden = golden_pack(case, tokenizer)
    assert [s.length for s in pack.samples] == golden["sample_lens"][:-1]  # the last is padding
    starts = set(pack.sample_starts)
    expected: list[tuple[SegmentKind, int]] = []
    at = 0
    for length, mode in zip(golden["split_lens"][:-1], golden["attn_modes"][:-1], strict=True):
        kind = MODES[mode]
        if expected and at not in starts and kind is expected[-1][0] is SegmentKind.TEXT:
            expected[-1] = (kind, expected[-1][1] + length)
        else:
            expected.append((kind, length))
        at += length
    assert [(p.segment.kind, p.segment.length) for p in pack.placed_segments()] == expected


@pytest.mark.parametrize("case", GOLDENS)
def test_golden_captions_labels_and_mask(case: str, tokenizer: Tokenizer) -> None:
    pack, ids, golden = golden_pack(case, tokenizer)
    tensors = load_file(shared_path("golden", f"{case}.safetensors"))
    for sample, expected in zip(pack.samples, golden["samples"], strict=True):
        caption = expected["sequence_plan"][-1].get("cap_index", [])
        assert list(range(*(sample.caption_span or (0, 0)))) == caption
    tokens = PackTokens.from_ids(pack, tensors["in/packed_text_ids"].new_tensor(ids))
    if "in/ce_loss_indexes" in tensors:
        assert tokens.ce_rows.tolist() == tensors["in/ce_loss_indexes"].tolist()
        assert tokens.ce_labels.tolist() == tensors["in/packed_label_ids"].tolist()
    else:
        assert label_rows(pack)[0].numel() == 0
    if "in/mse_loss_indexes" in tensors:
        assert pack.velocity_rows == tensors["in/mse_loss_indexes"].numel()
    mask = tensors["out/attention_mask_dense_incl_pad"][: pack.length, : pack.length]
    assert sum(mask_pairs(s.segments) for s in pack.samples) == int(mask.sum())


def plan(
    record: Record,
    task: Task,
    tokenizer: Tokenizer,
    dropout: Dropout = Dropout(),  # noqa: B008
    frame_conditions: str = "first",
    **changes: Any,
) -> Sample:
    """The sample planned from facts; it must be that of the prompt tokenised whole."""
    config = DataConfig(vae_resolution=256, vit_resolution=224, max_seconds_generation=1.5)
    media = [element for element in (*record.inputs, record.target) if isinstance(element, Media)]
    infos = changes.pop("infos", {m.element: IMAGE if m.kind == "image" else CLIP for m in media})
    text = text_facts(record, task, config.prompts, tokenizer)
    facts = RowFacts(tuple(MediaFact(m.element, infos[m.element]) for m in media), text)
    assert RowFacts.of(pa.RecordBatch.from_pylist([facts.values()], schema=FACTS_SCHEMA).to_pylist()[0]) == facts
    place = Place(record.source, record.file, record.row)
    sizing = Sizing.of(config, changes.pop("model", ModelConfig()))
    sample, items = plan_sample(facts, place, record.sample_id, task, frame_conditions, sizing, dropout)
    visual = [i for i, s in enumerate(sample.segments) if s.is_visual]
    assert [item.segment_index for item in items] == visual
    for item in items:
        assert (item.encoder == "vit") == (sample.segments[item.segment_index].kind is SegmentKind.VIT)
        assert all(size <= bucket for size, bucket in zip(item.size, item.bucket, strict=True))
    pieces = outline(record, task, config.prompts, dropout)
    blocks = [sample.segments[i] for i in visual]
    again, ids = assemble(record.sample_id, task, pieces, blocks, tokenizer)
    assert again == sample and len(ids) == sample.length
    return sample


def kinds(sample: Sample) -> list[str]:
    return [str(s.kind) for s in sample.segments]


def edit_record(n_conditions: int, target: str = "image") -> Record:
    media = tuple(Media(target, f"in{k}") for k in range(n_conditions))
    return Record("s", "f", 3, "", (*media, "Turn it blue."), Media(target, "out"))


def test_video_edit_keeps_the_same_frames_for_vit_and_vae(tokenizer: Tokenizer) -> None:
    sample = plan(edit_record(1, "video"), Task.V_EDIT, tokenizer)
    assert kinds(sample) == ["text", "vit", "clean", "text", "noise", "text"]
    vit, clean, noise = (sample.segments[i].grid for i in (1, 2, 4))
    assert clean == noise == (5, 14, 19)  # 17 frames of 224x304, the 4:3 bucket at area 256^2
    assert vit == (9, 6, 9)  # 17 frames, rounded up to pairs, of 168x252


def test_two_references_each_give_a_vit_and_a_clean_block(tokenizer: Tokenizer) -> None:
    record = replace(edit_record(2), inputs=("the man of", Media("image", "0"), "in", Media("image", "1"), "."))
    sample = plan(record, Task.S2I, tokenizer)
    assert kinds(sample) == ["text", "vit", "clean", "vit", "clean", "text", "noise", "text"]


def test_dropped_condition_takes_both_blocks_along(tokenizer: Tokenizer) -> None:
    sample = plan(edit_record(2), Task.S2I, tokenizer, Dropout(conditions=(0,)))
    assert kinds(sample) == ["text", "vit", "clean", "text", "noise", "text"]
    assert kinds(plan(edit_record(1), Task.I_EDIT, tokenizer, Dropout(conditions=(0,)))) == ["text", "noise", "text"]


def test_dropped_caption_is_the_prompt_without_the_caption_rows(tokenizer: Tokenizer) -> None:
    full, empty = (
        plan(edit_record(1), Task.I_EDIT, tokenizer),
        plan(edit_record(1), Task.I_EDIT, tokenizer, Dropout(caption=True)),
    )
    assert full.caption_span is not None and empty.caption_span is None
    assert full.length - empty.length == full.caption_span[1] - full.caption_span[0]


@pytest.mark.parametrize(("frame_conditions", "clean"), [("first", (0,)), ("first_last", (0, 4))])
def test_frame_conditions_stay_inside_the_noise_segment(
    tokenizer: Tokenizer, frame_conditions: str, clean: tuple[int, ...]
) -> None:
    record = Record("s", "f", 0, "", ("A car.",), Media("video", "video_bytes"))
    sample = plan(record, Task.I2V, tokenizer, frame_conditions=frame_conditions)
    assert kinds(sample) == ["text", "noise", "text"]
    assert sample.segments[1].clean_frames == clean
    assert sample.velocity_rows == (5 - len(clean)) * 14 * 19


def test_text_only_and_interleaved_understanding(tokenizer: Tokenizer) -> None:
    text = plan(Record("s", "f", 0, "", ("Hello?",), "Hi."), Task.T2T, tokenizer)
    assert kinds(text) == ["text"] and text.ce_rows > 0
    inputs = ("Compare", Media("image", "1"), "with", Media("video", "3"), "please.")
    mixed = plan(Record("s", "f", 0, "", inputs, "They differ."), Task.V2T, tokenizer)
    assert kinds(mixed) == ["text", "vit", "text", "vit", "text"]


def test_understanding_without_a_system_prompt_takes_the_configured_one(tokenizer: Tokenizer) -> None:
    prompts = PromptConfig()
    for question, expected in (("", prompts.captioning), ("What?", prompts.understanding)):
        record = Record("s", "f", 0, "", (Media("video", "video_bytes"), question), "A car.")
        first = outline(record, Task.V2T, prompts, Dropout())[1]
        assert getattr(first, "text", "") == "system\n" + expected.replace("{v}", "video")


def test_dropout_is_addressed_and_has_the_configured_rate() -> None:
    config = DataConfig(caption_dropout=0.3, condition_dropout=0.5)
    records = [replace(edit_record(2), row=row) for row in range(600)]

    def draw(epoch: int, stands_for: str = "") -> list[Dropout]:
        return [draw_dropout(config, 2, r.sample_id + stands_for, Task.S2I, 1, epoch) for r in records]

    drawn = draw(0)
    assert drawn == draw(0)
    assert drawn != draw(1) and drawn != draw(0, " for another")
    assert sum(d.caption for d in drawn) / 600 == pytest.approx(0.3, abs=0.06)
    assert sum(len(d.conditions) for d in drawn) / 1200 == pytest.approx(0.5, abs=0.06)
    assert draw_dropout(replace(config, caption_dropout=1.0), 1, "s/f/0", Task.I2T, 1, 0) == Dropout()


ALL, TEXT, NOTHING = Dropout(True, (0, 1)), Dropout(caption=True), Dropout()


@pytest.mark.parametrize(
    ("caption", "everything"),
    [(0.1, 0.0), (0.05, 0.05), (0.3, 0.7)],
    ids=["pre-training", "continued training and fine-tuning", "always something"],
)
def test_the_papers_scheme_drops_everything_or_the_caption_alone(caption: float, everything: float) -> None:
    config = DataConfig(dropout_scheme="paper", caption_dropout=caption, condition_dropout=everything)
    samples = 4000

    def draw(epoch: int) -> list[Dropout]:
        return [draw_dropout(config, 2, f"s/f/{row}", Task.S2I, 1, epoch) for row in range(samples)]

    drawn = draw(0)
    assert drawn == draw(0) and drawn != draw(1)
    shares = {what: drawn.count(what) / samples for what in (TEXT, ALL, NOTHING)}
    assert sum(shares.values()) == pytest.approx(1.0)  # nothing else occurs
    for what, want in ((TEXT, caption), (ALL, everything), (NOTHING, 1 - caption - everything)):
        assert shares[what] == pytest.approx(want, abs=4 * (want * (1 - want) / samples) ** 0.5 + 1e-9)
    assert draw_dropout(replace(config, caption_dropout=1.0), 1, "s/f/0", Task.V2T, 1, 0) == NOTHING
    without = [draw_dropout(config, 0, f"s/f/{row}", Task.T2I, 1, 0).caption for row in range(samples)]
    assert without == [what != NOTHING for what in drawn]  # a caption to a picture has nothing else to drop


@pytest.mark.parametrize(
    ("record", "task", "message"),
    [
        (edit_record(0), Task.I_EDIT, "has 0 condition media"),
        (edit_record(1), Task.T2I, "has 1 condition media"),
        (edit_record(1), Task.V_EDIT, "the target is image; task v_edit needs video"),
        (replace(edit_record(1), inputs=(Media("image", "a"), "")), Task.I_EDIT, "the caption is empty"),
        (Record("s", "f", 0, "", (Media("image", "a"), "?"), ""), Task.I2T, "needs an answer"),
        (Record("s", "f", 0, "", ("?",), "yes"), Task.I2T, "has 0 media"),
        (Record("s", "f", 0, "", ("",), "yes"), Task.T2T, "needs a question"),
    ],
)
def test_records_that_do_not_fit_the_task(record: Record, task: Task, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(RecordError, match=message):
        plan(record, task, tokenizer)


def test_short_clip_and_large_grid_are_refused(tokenizer: Tokenizer) -> None:
    record = Record("s", "f", 0, "", ("A car.",), Media("video", "v"))
    small = ModelConfig(latent_position_frames=4, latent_position_size=8)
    two_frames = MediaInfo("video", 640, 480, 2, 24.0)
    with pytest.raises(RecordError, match="s/f/0 v: 1 frames give 1 latent frames, none is left beside the frame cond"):
        plan(record, Task.I2V, tokenizer, infos={"v": two_frames})
    with pytest.raises(RecordError, match="exceeds the position table of 4 x 8 x 8"):
        plan(record, Task.I2V, tokenizer, model=small)


@pytest.mark.parametrize("caption", ["Turn it blue.", " \n and now?", "\n", "😀 <|im_end|>"])
@pytest.mark.parametrize("task", [Task.T2I, Task.I_EDIT, Task.S2I])
def test_every_dropout_is_planned_from_the_same_facts(caption: str, task: Task, tokenizer: Tokenizer) -> None:
    """`plan` compares with the prompt tokenised whole; captions that merge with the template are among them."""
    conditions = {Task.T2I: 0, Task.I_EDIT: 1, Task.S2I: 3}[task]
    media = tuple(Media("image", f"in{k}") for k in range(conditions))
    record = Record("s", "f", 3, "", (*media, caption), Media("image", "out"))
    lengths = set()
    for dropped in (c for n in range(conditions + 1) for c in combinations(range(conditions), n)):
        for without_caption in (False, True):
            lengths.add(plan(record, task, tokenizer, Dropout(without_caption, dropped)).length)
    assert len(lengths) == 2 * (conditions + 1)
