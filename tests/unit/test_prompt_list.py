"""Prompt lists and the folders they are sampled into: what scoring programs read, and what a kill leaves."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_lance.config.errors import UserError
from megatron_lance.packing.sample import Task
from megatron_lance.sampling import results as results_module
from megatron_lance.sampling.layouts import LAYOUTS, check_places
from megatron_lance.sampling.media import Frames
from megatron_lance.sampling.prompt_list import Defaults, Line, read_list
from megatron_lance.sampling.requests import PromptError
from megatron_lance.sampling.results import Results, spread
from tests.command import Commander
from tests.tiny import TinyRun, jpeg, mp4, write_weights

ROW = {"prompt": "a/b", "id": "x7", "task_type": "color", "instruction_language": "en", "key": "k1"}


def picture(value: int, frames: int = 1) -> Frames:
    return np.full((frames, 16, 16, 3), value, np.uint8)


def lines_of(folder: Path, layout: str, *rows: dict[str, Any]) -> list[Line]:
    """The rows as a list on disk, read again."""
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_list(path, Defaults(LAYOUTS[layout].task, (32, 32), 5, 0), "list")


def write(out: Path, layout: str, lines: list[Line], frames: int = 1) -> None:
    """Sample all lines with pictures that tell line and copy."""
    results = Results(out, LAYOUTS[layout], LAYOUTS[layout].copies, 8.0, lines)
    done = results.open({"steps": 2})
    for line in lines:
        for copy in range(LAYOUTS[layout].copies):
            if (line.number, copy) not in done:
                result = picture(10 * line.number + copy, frames)
                results.add(line, copy, result if line.task.is_generation else f"(A) answer {line.number}")
    results.finish()


def test_layouts_name_their_files() -> None:
    line = Line(3, ROW, Task.T2I, ("a/b",), (), None, None, 0, "line 4")
    names = {name: layout.path_of(line, 2, ".png", layout.copies) for name, layout in LAYOUTS.items() if layout.path}
    assert names == {
        "flat": "0003.png",
        "geneval": "00003/samples/00002.png",
        "dpg": "images/x7.png",
        "vbench": "videos/a_b-2.png",
        "gedit": "fullset/color/en/k1.png",
    }
    assert LAYOUTS["flat"].path_of(line, 1, ".png", 2) == "0003_1.png"
    outside = replace(line, row={**ROW, "key": "../../k"})
    assert LAYOUTS["gedit"].path_of(outside, 0, ".png", 1) == "fullset/color/en/.._.._k.png"
    with pytest.raises(PromptError, match="'task_type'"):
        LAYOUTS["gedit"].path_of(replace(line, row={"prompt": "a"}), 0, ".png", 1)
    with pytest.raises(PromptError, match="'id'"):
        LAYOUTS["dpg"].path_of(replace(line, row={"prompt": "a"}), 0, ".png", 1)


@pytest.mark.parametrize("value", ["..", ".", " ", "", None, 1.5, True, ["../../x"], {"a": 1}])
def test_what_cannot_name_a_file_is_refused(value: object) -> None:
    """No field of a list leads out of the folder or to a place that two samples share."""
    line = Line(3, {**ROW, "task_type": value}, Task.I_EDIT, ("a",), (), None, None, 0, "list line 4")
    with pytest.raises(PromptError, match=r"list line 4: task_type .*names its file"):
        LAYOUTS["gedit"].path_of(line, 0, ".png", 1)


def test_names_are_measured_with_their_ending(tmp_path: Path) -> None:
    """250 letters, "-4" and ".mp4" are one byte too many, which is said before anything is sampled."""
    with pytest.raises(PromptError, match="list line 1: the name of its file has 256 bytes"):
        check_places(lines_of(tmp_path, "vbench", {"prompt": "a" * 250}), LAYOUTS["vbench"], 5)
    check_places(lines_of(tmp_path, "vbench", {"prompt": "a" * 249}), LAYOUTS["vbench"], 5)


def test_a_layout_takes_what_its_scoring_program_reads(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="list line 1: task t2v: layout dpg takes t2i"):
        check_places(lines_of(tmp_path, "dpg", {"task": "t2v", "prompt": "a", "id": 1}), LAYOUTS["dpg"], 4)


def test_geneval_finds_metadata_and_samples(tmp_path: Path) -> None:
    """Its folders are those whose names are digits, with one JSON object and pictures that are numbers."""
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": f"photo {i}"} for i in (1, 2)
    ]
    write(tmp_path / "out", "geneval", lines_of(tmp_path, "geneval", *rows))
    folders = sorted(path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name.isdigit())
    assert [path.name for path in folders] == ["00000", "00001"]
    for number, folder in enumerate(folders):
        with (folder / "metadata.jsonl").open(encoding="utf-8") as file:
            assert json.load(file) == rows[number]
        names = sorted(os.listdir(folder / "samples"))
        assert names == [f"{copy:05d}.png" for copy in range(4)] and all(re.match(r"\d+\.png", n) for n in names)


def test_dpg_finds_grids_named_by_item(tmp_path: Path) -> None:
    write(tmp_path / "out", "dpg", lines_of(tmp_path, "dpg", {"item_id": "partiprompts0", "prompt": "a cat"}))
    assert os.listdir(tmp_path / "out" / "images") == ["partiprompts0.png"]
    with Image.open(tmp_path / "out" / "images" / "partiprompts0.png") as grid:
        crops = [np.asarray(grid.crop((x, y, x + 16, y + 16))) for y in (0, 16) for x in (0, 16)]
    assert [crop[0, 0, 0] for crop in crops] == [0, 1, 2, 3]


def test_vbench_finds_nothing_but_clips_named_by_its_prompt(tmp_path: Path) -> None:
    """It takes the ending of the first file it finds for that of all."""
    rows = [{"prompt_en": "a cat, 4K.", "prompt": "a long description of a cat"}]
    lines = lines_of(tmp_path, "vbench", *rows)
    assert lines[0].texts == ("a long description of a cat",)
    write(tmp_path / "out", "vbench", lines, frames=5)
    assert sorted(os.listdir(tmp_path / "out" / "videos")) == [f"a cat, 4K.-{copy}.mp4" for copy in range(5)]


def test_gedit_finds_sources_beside_edits(tmp_path: Path) -> None:
    (tmp_path / "in.jpg").write_bytes(jpeg("red"))
    row = {
        "key": "k9",
        "task_type": "subject-add",
        "instruction_language": "cn",
        "instruction": "add",
        "input_image": "in.jpg",
    }
    write(tmp_path / "out", "gedit", lines_of(tmp_path, "gedit", row))
    folder = tmp_path / "out" / "fullset" / "subject-add" / "cn"
    assert sorted(os.listdir(folder)) == ["k9.png", "k9_SRCIMG.png"]
    with Image.open(folder / "k9_SRCIMG.png") as source, Image.open(tmp_path / "in.jpg") as given:
        assert source.format == "PNG" and np.array_equal(np.asarray(source), np.asarray(given.convert("RGB")))


def test_mvbench_is_asked_with_its_options_and_keeps_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "in.mp4").write_bytes(mp4("red"))
    row = {"video": "in.mp4", "question": "Which way?", "candidates": ["left", "right"], "answer": "right"}
    lines = lines_of(tmp_path, "mvbench", {**row, "task_type": "Moving Direction"})
    question = lines[0].texts[0].splitlines()
    assert question[:3] == ["Which way?", "(A) left", "(B) right"] and "letter" in question[3]
    write(tmp_path / "out", "mvbench", lines)
    choices = json.loads((tmp_path / "out" / "choices.json").read_text())
    assert choices == {"res_list": [{"pred": "(A) answer 0", "gt": "(B) right", "task_type": "Moving Direction"}]}
    for wrong in ("left", ["left"], ["left", 3]):
        with pytest.raises(PromptError, match="candidates"):
            lines_of(tmp_path, "mvbench", {**row, "candidates": wrong})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"captoin": "a"}, "field 'captoin': is unknown; write 'caption'"),
        ({"prompt": "a", "szie": "32x32"}, "field 'szie': is unknown; write 'size'"),
        ({"prompt": "a", "Seed": 1}, "field 'Seed': is unknown; write 'seed'"),
        ({"prompt": "a", "frame": 5}, "field 'frame': is unknown; write 'frames'"),
        ({"prompt": "a", "imgae": "in.jpg"}, "field 'imgae': is unknown; write 'image'"),
        ({"prompt": 5}, "has no text"),
        ({"prompt": ""}, "has no text"),
        ({"prompt": "a", "size": 64}, "size 64: must be HxW"),
        ({"prompt": "a", "size": "64"}, "size '64': must be HxW"),
        ({"prompt": "a", "size": "20x64"}, "size '20x64': both sides must be positive"),
        ({"prompt": "a", "frames": "5"}, "frames '5': must be 4k"),
        ({"prompt": "a", "frames": 5.5}, "frames 5.5: must be 4k"),
        ({"prompt": "a", "seed": "x"}, "seed 'x': must be a whole number"),
        ({"prompt": "a", "seed": True}, "seed True: must be a whole number"),
        ({"prompt": "a", "task": ["t2i"]}, r"task \['t2i'\]: must be one of"),
        ({"prompt": "a", "task": "i_edit", "image": "in.jpg", "turns": "redder"}, "turns 'redder': must be a list"),
        ({"prompt": "a", "task": "i_edit", "image": "in.jpg", "turns": [""]}, r"turns \[''\]: must be a list"),
        ({"prompt": "a", "task": "i_edit", "image": 5}, "image 5: must be the path of a file"),
        ({"prompt": "a", "task": "s2i", "images": ["in.jpg", None]}, "images .* must be the path of a file or a list"),
        ({"prompt": "a", "task": "i_edit", "image": "out.jpg"}, "image: there is no file .*out.jpg"),
        ({"prompt": "a", "task": "i2v", "last_frame": "in.jpg"}, "last_frame: comes alone; give the first_frame too"),
    ],
)
def test_a_wrong_line_is_named_with_field_and_value(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "in.jpg").write_bytes(jpeg("red"))
    with pytest.raises(PromptError, match=f"^list line 2: {message}"):
        lines_of(tmp_path, "flat", {"task": "t2i", "prompt": "right"}, {"task": "t2i", **row})


@pytest.mark.parametrize(("text", "message"), [(b'{"prompt": "a"', "is not JSON"), (b'{"prompt": "\xff"}', "UTF-8")])
def test_a_line_that_is_no_json_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "list.jsonl").write_bytes(b'{"task": "t2i", "prompt": "a"}\n' + text)
    with pytest.raises(PromptError, match=f"list line 2: .*{message}"):
        read_list(tmp_path / "list.jsonl", Defaults(None, None, None, 0), "list")


def test_fields_of_other_programs_are_kept_and_null_is_none(tmp_path: Path) -> None:
    """Blank lines count but are passed over; a mark at the file's beginning is none of the text."""
    row = {
        "prompt": "a",
        "tag": "t",
        "mask": "m.png",
        "question_id": 3,
        "images": None,
        "seed": None,
        "candidates": None,
    }
    path = tmp_path / "list.jsonl"
    path.write_text("\ufeff" + json.dumps(row) + "\r\n\n" + json.dumps({**row, "seed": 7}) + "\n", encoding="utf-8")
    lines = read_list(path, Defaults(Task.T2I, None, None, 4), "list")
    assert [(line.number, line.seed, line.where) for line in lines] == [(0, 4, "list line 1"), (2, 7, "list line 3")]
    assert lines[0].row == row and not lines[0].media


def test_an_understanding_line_is_asked_its_question(tmp_path: Path) -> None:
    (tmp_path / "in.jpg").write_bytes(jpeg("red"))
    row = {"task": "i2t", "image": "in.jpg", "caption": "a red square"}
    lines = lines_of(tmp_path, "flat", {**row, "question": "Which colour?"}, {**row, "question": ""})
    assert [line.texts for line in lines] == [("Which colour?",), ("",)]


def test_texts_may_hold_any_end_of_line(tmp_path: Path) -> None:
    """JSON writes U+2028, U+0085 and a form feed as they are or escaped; notes of them are read again whole."""
    row = {"task": "t2i", "prompt": "a\u2028b\x85c\x0cd", "file": "x.jpg", "answer": "y"}
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = read_list(path, Defaults(None, (16, 16), 1, 0), "list")
    write(tmp_path / "out", "flat", lines)
    assert Results(tmp_path / "out", LAYOUTS["flat"], 1, 8.0, lines).open({"steps": 2}) == {(0, 0)}
    (tmp_path / "out" / "0000.png").unlink()
    assert Results(tmp_path / "out", LAYOUTS["flat"], 1, 8.0, lines).open({"steps": 2}) == set()


def test_a_line_s_own_fields_are_not_taken_for_results(tmp_path: Path) -> None:
    """A question whose row names a file is no picture, and a caption whose row has an answer no answer."""
    (tmp_path / "in.jpg").write_bytes(jpeg("red"))
    rows: list[dict[str, Any]] = [
        {"task": "i2t", "question": "a?", "image": "in.jpg", "file": "elsewhere.jpg"},
        {"task": "t2i", "prompt": "a", "answer": "b", "candidates": ["a", "b"]},
    ]
    write(tmp_path / "out", "flat", lines_of(tmp_path, "flat", *rows))
    notes = [json.loads(text) for text in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert "file" not in notes[0] and "answer" not in notes[1] and notes[1]["file"] == "0001.png"
    assert not (tmp_path / "out" / "choices.json").exists()


def test_two_lines_of_one_file_are_refused(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "vbench", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"})
    with pytest.raises(
        PromptError, match="list line 1 and list line 3: would be written to the same file videos/a-4.mp4"
    ):
        check_places(lines, LAYOUTS["vbench"], 5)
    check_places(lines, LAYOUTS["flat"], 1)


def test_a_contact_sheet_shows_all_of_a_list() -> None:
    assert list(spread(range(64), 64)) == list(range(64)) and list(spread(range(5), 64)) == list(range(5))
    shown = list(spread(range(216), 64))
    assert len(shown) <= 64 and shown[0] == 0 and shown[-1] >= 200


def killed_in_the_midst_of(out: Path, lines: list[Line], copies: int) -> None:
    """A process that is killed when half of the last copy's bytes are written."""
    child = os.fork()
    if child == 0:
        results = Results(out, LAYOUTS["geneval"], copies, 8.0, lines)
        results.open({})
        for copy in range(copies):
            if copy == copies - 1:

                def half(path: Path, pixels: Frames, text: str) -> None:
                    path.write_bytes(b"\x89PNG half")
                    os.kill(os.getpid(), signal.SIGKILL)

                setattr(results_module, "write_png", half)  # noqa: B010
            results.add(lines[0], copy, picture(copy))
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_file_that_a_kill_cut_short_is_not_taken_for_done(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "geneval", {"prompt": "a"})
    out = tmp_path / "out"
    killed_in_the_midst_of(out, lines, 3)
    assert sorted(os.listdir(out / "00000" / "samples")) == ["00000.png", "00001.png"]
    again = Results(out, LAYOUTS["geneval"], 3, 8.0, lines)
    assert again.open({}) == {(0, 0), (0, 1)}
    again.add(lines[0], 2, picture(2))
    assert again.open({}) == {(0, 0), (0, 1), (0, 2)}


def test_a_torn_note_and_a_lost_file_are_made_again(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "geneval", {"prompt": "ä"})
    out = tmp_path / "out"
    write(out, "geneval", lines)
    notes = out / "samples.jsonl"
    notes.write_bytes(notes.read_bytes()[:-20])
    (out / "00000" / "samples" / "00001.png").unlink()
    assert Results(out, LAYOUTS["geneval"], 4, 8.0, lines).open({"steps": 2}) == {(0, 0), (0, 2)}
    write(out, "geneval", lines)
    noted = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    assert sorted(row["copy"] for row in noted) == [0, 1, 2, 3]
    assert Results(out, LAYOUTS["geneval"], 6, 8.0, lines).open({"steps": 2}) == {(0, copy) for copy in range(4)}


def test_a_folder_goes_on_with_its_own_list_and_settings_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "flat", lines_of(tmp_path, "flat", {"task": "t2i", "prompt": "a"}))
    with pytest.raises(UserError, match="sample of line 1 was made of another prompt"):
        write(out, "flat", lines_of(tmp_path, "flat", {"task": "t2i", "prompt": "b"}))
    with pytest.raises(UserError, match="other settings, steps: 2 -> 3"):
        Results(out, LAYOUTS["flat"], 1, 8.0, []).open({"steps": 3})


def test_all_lines_are_looked_through_before_one_is_sampled(
    command: Commander, tiny_run: TinyRun, tmp_path: Path
) -> None:
    weights = write_weights(tmp_path / "weights", tiny_run.load().model, {})
    (tmp_path / "broken.jpg").write_bytes(jpeg("red")[:100])
    (tmp_path / "in.jpg").write_bytes(jpeg("red"))
    line = (
        f"sample --config {tiny_run.config} --weights {weights} --prompts list.jsonl --size 32x32 --out out --steps 1"
    )
    for row, message in (
        ({"task": "i_edit", "prompt": "b", "image": "broken.jpg"}, "medium 1 of 1: "),
        ({"task": "i_edit", "prompt": "b"}, "has 0 condition media; task i_edit takes at least 1"),
        ({"task": "t2i", "prompt": "b", "image": "in.jpg"}, "has 1 condition media; task t2i takes none"),
        ({"task": "t2v", "prompt": "b"}, "task t2v needs a size and a number of frames"),
    ):
        (tmp_path / "list.jsonl").write_text('{"task": "t2i", "prompt": "a"}\n' + json.dumps(row))
        outcome = command(line, folder=tmp_path)
        assert outcome.code == 2 and f"--prompts list.jsonl line 2: {message}" in outcome.err, outcome.err
        assert not (tmp_path / "out").exists()


def test_samples_of_other_weights_or_positions_are_not_mixed(
    command: Commander, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """A run that has saved again has other weights, though its folder's name is the same."""
    train = f"train --config {tiny_run.config} training.run_dir=run training.resume=auto training.train_iters"
    sample = f"sample --config {tiny_run.config} --prompt a --size 32x32 --steps 1 --out out"
    assert command(f"{train}=1", folder=tmp_path).code == 0
    assert command(f"{sample} --weights run", folder=tmp_path).code == 0
    other = command(f"{sample} --weights run --resume --copies 2 model.mape=none", folder=tmp_path)
    assert other.code == 2 and "model.mape: 'release' -> 'none'" in other.err, other.err
    assert command(f"{train}=2", folder=tmp_path).code == 0
    later = command(f"{sample} --weights run --resume --copies 2", folder=tmp_path)
    assert later.code == 2 and "step_00000001' -> 'run/checkpoints/step_00000002'" in later.err, later.err
    same = command(f"{sample} --weights run/checkpoints/step_00000001 --resume --copies 2", folder=tmp_path)
    assert same.code == 0 and sorted(p.name for p in (tmp_path / "out").glob("0*.png")) == ["0000.png", "0000_1.png"]


def test_every_copy_of_an_answer_has_a_seed_of_its_own(command: Commander, tiny_run: TinyRun, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "weights", tiny_run.load().model, {})
    rows = [{"task": "t2t", "question": "Which?", "seed": seed} for seed in (3, 3, 4)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = f"sample --config {tiny_run.config} --weights {weights} --prompts list.jsonl --copies 2 --out out"
    done = command(f"{line} --top-p 1 --max-tokens 6", folder=tmp_path)
    assert done.code == 0, done.err
    notes = [json.loads(text) for text in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(notes) == 6 and len({note["answer"] for note in notes}) == 6, notes


def test_the_command_goes_on_where_it_was_killed(command: Commander, tiny_run: TinyRun, tmp_path: Path) -> None:
    """Files after the resume are those of a run that was left alone, bit for bit."""
    (tmp_path / "list.jsonl").write_text(
        '{"task": "t2i", "prompt": "a"}\n{"task": "t2i", "prompt": "b"}\n{"task": "t2t", "question": "c"}\n'
    )
    assert (
        command(f"train --config {tiny_run.config} training.run_dir=run training.train_iters=1", folder=tmp_path).code
        == 0
    )
    line = f"sample --config {tiny_run.config} --weights run --prompts list.jsonl --size 32x32 --steps 2 --max-tokens 2"
    whole = command(f"{line} --batch 1 --out whole", folder=tmp_path)
    assert whole.code == 0, whole.err
    assert command(f"{line} --batch 1 --out out", folder=tmp_path).code == 0
    notes = tmp_path / "out" / "samples.jsonl"
    notes.write_bytes(notes.read_bytes().splitlines(keepends=True)[0] + b'{"task"')
    (tmp_path / "out" / "0001.png").write_bytes(b"half")
    resumed = command(f"{line} --batch 1 --out out --resume", folder=tmp_path)
    assert resumed.code == 0, resumed.err
    assert notes.read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
    for name in ("0000.png", "0001.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = command(f"{line} --steps 3 --out out --resume", folder=tmp_path)
    assert other.code == 2 and "made with other settings, steps: 2 -> 3" in other.err
