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
from megatron_lance.sampling.media import Frames
from megatron_lance.sampling.prompt_list import LAYOUTS, Defaults, Line, check_places, read_list
from megatron_lance.sampling.requests import PromptError
from megatron_lance.sampling.results import Results
from tests.command import Commander
from tests.tiny import TinyRun, jpeg, mp4

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
    line = Line(3, ROW, Task.T2I, ("a/b",), (), None, None, 0)
    names = {name: line.path(layout, 2, ".png", layout.copies) for name, layout in LAYOUTS.items() if layout.path}
    assert names == {
        "flat": "0003.png",
        "geneval": "00003/samples/00002.png",
        "dpg": "images/x7.png",
        "vbench": "videos/a_b-2.png",
        "gedit": "fullset/color/en/k1.png",
    }
    assert line.path(LAYOUTS["flat"], 1, ".png", 2) == "0003_1.png"
    outside = replace(line, row={**ROW, "key": "../../k"})
    assert outside.path(LAYOUTS["gedit"], 0, ".png", 1) == "fullset/color/en/.._.._k.png"
    with pytest.raises(PromptError, match="'task_type'"):
        replace(line, row={"prompt": "a"}).path(LAYOUTS["gedit"], 0, ".png", 1)
    with pytest.raises(PromptError, match="'id'"):
        replace(line, row={"prompt": "a"}).path(LAYOUTS["dpg"], 0, ".png", 1)
    with pytest.raises(PromptError, match="has 306 bytes"):
        replace(line, texts=("a" * 300,)).path(LAYOUTS["vbench"], 0, ".mp4", 1)


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


def test_two_lines_of_one_file_are_refused(tmp_path: Path) -> None:
    lines = lines_of(tmp_path, "vbench", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"})
    with pytest.raises(PromptError, match="lines 1 and 3: would be written to the same file"):
        check_places(lines, LAYOUTS["vbench"], 5)
    check_places(lines, LAYOUTS["flat"], 1)


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
