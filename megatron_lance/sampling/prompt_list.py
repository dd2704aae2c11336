"""Prompt lists: a JSONL of prompts, and where the results go.

Station: JSONL -> [lines] -> engine -> files.  A line is an object with a text (caption, prompt, prompt_en, instruction
or question), for conditions the paths of media (media, image, images, input_image, video, first_frame, last_frame), and
optionally task, size, frames, seed, turns (a list of further instructions).  Folder layouts are those that the
benchmarks' own scoring programs read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lance.packing.sample import Task
from megatron_lance.sampling.requests import Prompt, PromptError

TEXT_KEYS = ("caption", "prompt", "prompt_en", "instruction", "question")
MEDIA_KEYS = ("media", "images", "image", "input_image", "video", "first_frame", "last_frame")


@dataclass(frozen=True)
class Layout:
    """Where a benchmark expects results.

    Attributes:
        task: of its prompts; None: each line says it.
        copies: samples per prompt.
        path: of a sample below the folder, a format of number, copy, suffix and the line's own fields.
        grid: whether the copies of a prompt become one picture.
        metadata: file beside the samples that repeats the line, a format like `path`; empty: none.
    """

    task: Task | None
    copies: int
    path: str
    grid: bool = False
    metadata: str = ""


LAYOUTS = {
    "flat": Layout(None, 1, "{number:04d}{copy_suffix}{suffix}"),
    "geneval": Layout(Task.T2I, 4, "{number:05d}/samples/{copy:05d}{suffix}", metadata="{number:05d}/metadata.jsonl"),
    "dpg": Layout(Task.T2I, 4, "{id}{suffix}", grid=True),
    "vbench": Layout(Task.T2V, 5, "{text}-{copy}{suffix}"),
    "gedit": Layout(Task.I_EDIT, 1, "fullset/{task_type}/{instruction_language}/{key}{suffix}"),
    "mvbench": Layout(Task.V2T, 1, ""),
}


@dataclass(frozen=True)
class Line:
    """One line of a list.

    Attributes:
        number: from 0.
        row: the object.
        task: of the line.
        texts: of each turn; one unless it is a multi-turn edit.
        media: paths of the conditions.
        size: (H, W) or None.
        frames: or None.
        seed: of its first copy.
    """

    number: int
    row: Mapping[str, Any]
    task: Task
    texts: tuple[str, ...]
    media: tuple[Path, ...]
    size: tuple[int, int] | None
    frames: int | None
    seed: int

    def prompt(self, turn: int, media: tuple[bytes, ...]) -> Prompt:
        """What is sampled in a turn; its name addresses the noise."""
        name = f"line {self.number}" if turn == 0 else f"line {self.number} turn {turn}"
        return Prompt(name, self.task, self.texts[turn], media, self.size, self.frames)

    def path(self, layout: Layout, copy: int, suffix: str, copies: int) -> str:
        """The sample's place below the folder.

        Raises:
            PromptError: if the line lacks a field that the layout names its file by.
        """
        text = re.sub(r"[/\0]", "_", self.texts[0])
        fields = {"id": f"{self.number:04d}", **self.row, "number": self.number, "copy": copy, "suffix": suffix}
        fields |= {"text": text, "copy_suffix": f"_{copy}" if copies > 1 else ""}
        try:
            return layout.path.format(**fields)
        except KeyError as error:
            raise PromptError(
                f"line {self.number + 1}: has no field {error}, which names its file; add it or choose --layout flat"
            ) from None


@dataclass(frozen=True)
class Defaults:
    """What holds for lines that do not say it.

    Attributes:
        task: or None.
        size: (H, W) or None.
        frames: or None.
        seed: of the first copy.
    """

    task: Task | None
    size: tuple[int, int] | None
    frames: int | None
    seed: int


def parse_size(text: str, where: str) -> tuple[int, int]:
    """(H, W) of "HxW".

    Raises:
        PromptError: unless both are positive multiples of 16.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise PromptError(f"{where} {text!r}: must be HxW in pixels, for example 480x848")
    height, width = int(match[1]), int(match[2])
    if height % 16 or width % 16 or height < 16 or width < 16:
        raise PromptError(f"{where} {text!r}: both sides must be positive multiples of 16")
    return height, width


def check_frames(frames: int, where: str) -> int:
    """`frames`, if it is 4k+1.

    Raises:
        PromptError: otherwise.
    """
    if frames < 1 or frames % 4 != 1:
        raise PromptError(f"{where} {frames}: must be 4k+1, for example 1, 5, 9 or 73")
    return frames


def parse_line(number: int, row: Any, folder: Path, defaults: Defaults, where: str) -> Line:
    """A line from its object.

    Args:
        number: from 0.
        row: the object.
        folder: relative paths of media start there.
        defaults: for what the line does not say.
        where: the list and line, for errors.

    Raises:
        PromptError: naming the field that is missing or wrong.
    """
    if not isinstance(row, dict):
        raise PromptError(f'{where}: is no object; write for example {{"task": "t2i", "caption": "..."}}')
    name = row.get("task", defaults.task)
    if name not in list(Task):
        raise PromptError(f"{where}: task {name!r}: must be one of {', '.join(Task)}; give it or --task")
    text = next((row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), "")
    if not text and name not in (Task.I2T, Task.V2T):  # captioning has no question
        raise PromptError(f"{where}: has no text; give one of {', '.join(TEXT_KEYS)}")
    paths: list[Path] = []
    for key in MEDIA_KEYS:
        value = row.get(key, [])
        paths += [folder / path for path in ([value] if isinstance(value, str) else value)]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        raise PromptError(f"{where}: there is no file {absent[0]}; paths are relative to the list's folder")
    size = parse_size(row["size"], f"{where}: size") if "size" in row else defaults.size
    frames = check_frames(int(row["frames"]), f"{where}: frames") if "frames" in row else defaults.frames
    turns, task = tuple(row.get("turns", ())), Task(name)
    if turns and not task.is_edit:
        raise PromptError(f"{where}: turns belong to edits; task {task} has none")
    return Line(number, row, task, (text, *turns), tuple(paths), size, frames, int(row.get("seed", defaults.seed)))


def read_list(path: Path, defaults: Defaults) -> list[Line]:
    """All lines of a JSONL file.

    Raises:
        PromptError: if the file is absent or empty, or naming the line that is wrong.
    """
    if not path.is_file():
        raise PromptError(f"--prompts {path}: there is no such file; give a JSONL of prompts")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines()):
        where = f"--prompts {path} line {number + 1}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise PromptError(f"{where}: is not JSON ({error})") from None
        lines.append(parse_line(number, row, path.parent, defaults, where))
    if not lines:
        raise PromptError(f"--prompts {path}: is empty; give one prompt a line")
    return lines
