"""Prompt lists: a JSONL of prompts, and where the results go.

Station: JSONL -> [lines] -> engine -> files.  A line is an object with a text (caption, prompt, prompt_en, instruction
or question), for conditions the paths of media (media, image, images, input_image, video, first_frame, last_frame), and
optionally task, size, frames, seed, turns (a list of further instructions), candidates (options of a question).

Folder layouts are those that the benchmarks' own scoring programs read, below OUT:
    geneval  its metadata list; score OUT.
    dpg      lines with id (its item_id); score OUT/images, whose pictures are grids of four, with the side of one as
             resolution; sizes are square.
    vbench   lines with prompt_en, which names the file, and maybe prompt or caption, which are sampled then; score
             OUT/videos.  Its temporal flickering wants 25 copies.
    gedit    lines with key, task_type, instruction_language and input_image; score OUT; its fullset has sources too.
    mvbench  lines with question, candidates, answer, task_type and a whole video; OUT/choices.json has, as its notebook
             collects them, what was said (pred) and the right option (gt).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lance.config.schema import ModelConfig
from megatron_lance.data.sizes import vae_grid
from megatron_lance.packing.sample import Task
from megatron_lance.sampling.requests import Prompt, PromptError

TEXT_KEYS = ("caption", "prompt", "prompt_en", "instruction", "question")
CHOOSE = "Answer with the letter of the best option."
"""What a question with options ends with."""
MAX_NAME = 255
"""Bytes of a file's name."""
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
        source: file beside the samples with the picture that is edited, a format like `path`; empty: none.
    """

    task: Task | None
    copies: int
    path: str
    grid: bool = False
    metadata: str = ""
    source: str = ""


LAYOUTS = {
    "flat": Layout(None, 1, "{number:04d}{copy_suffix}{suffix}"),
    "geneval": Layout(Task.T2I, 4, "{number:05d}/samples/{copy:05d}{suffix}", metadata="{number:05d}/metadata.jsonl"),
    "dpg": Layout(Task.T2I, 4, "images/{id}{suffix}", grid=True),
    "vbench": Layout(Task.T2V, 5, "videos/{text}-{copy}{suffix}"),
    "gedit": Layout(
        Task.I_EDIT,
        1,
        "fullset/{task_type}/{instruction_language}/{key}{suffix}",
        source="fullset/{task_type}/{instruction_language}/{key}_SRCIMG.png",
    ),
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

    def read_media(self) -> tuple[bytes, ...]:
        """The files of its conditions."""
        return tuple(path.read_bytes() for path in self.media)

    def path(self, layout: Layout, copy: int, suffix: str, copies: int) -> str:
        """The sample's place below the folder.

        Raises:
            PromptError: if the line lacks a field that the layout names its file by, or the name is too long.
        """
        return self.place(layout.path, copy=copy, suffix=suffix, copy_suffix=f"_{copy}" if copies > 1 else "")

    def place(self, form: str, **fields: object) -> str:
        """A place below the folder, from a format of the line's fields and others; raises PromptError as `path`."""
        row = {"id": self.row["item_id"]} if "item_id" in self.row else {}
        known = {**row, **self.row, "text": self.row.get("prompt_en", self.texts[0])}
        plain = {key: re.sub(r"[/\0]", "_", value) if isinstance(value, str) else value for key, value in known.items()}
        try:
            name = form.format(**{**plain, "number": self.number, **fields})
        except KeyError as error:
            raise PromptError(
                f"line {self.number + 1}: has no field {error}, which names its file; add it or choose --layout flat"
            ) from None
        longest = max(len(part.encode()) for part in name.split("/"))
        if longest > MAX_NAME:
            raise PromptError(
                f"line {self.number + 1}: the name of its file has {longest} bytes, file systems take {MAX_NAME}; "
                "shorten the text or choose --layout flat"
            )
        return name


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
    if "candidates" in row:
        text = _multiple_choice(text, row["candidates"], where)
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


def options_of(candidates: Sequence[str]) -> list[str]:
    """Options of a multiple choice with their letters."""
    return [f"({chr(ord('A') + number)}) {text}" for number, text in enumerate(candidates)]


def _multiple_choice(question: str, candidates: Any, where: str) -> str:
    """The question with its options.

    Raises:
        PromptError: unless they are a list of up to 26 texts.
    """
    if not isinstance(candidates, list) or not 1 < len(candidates) <= 26 or any(type(c) is not str for c in candidates):
        raise PromptError(f"{where}: candidates {candidates!r}: must be a list of 2 to 26 texts")
    return "\n".join([question, *options_of(candidates), CHOOSE])


def check_places(lines: Sequence[Line], layout: Layout, copies: int) -> None:
    """Look whether every sample has a place of its own.

    Raises:
        PromptError: naming the line that has none, or the two lines that share one.
    """
    owners: dict[str, int] = {}
    for line in lines if layout.path else ():
        if line.task.is_generation:
            owner = owners.setdefault(line.path(layout, 0, "", copies), line.number)
            if owner != line.number:
                raise PromptError(
                    f"lines {owner + 1} and {line.number + 1}: would be written to the same file; leave one out"
                )


def read_list(path: Path, defaults: Defaults, name: str) -> list[Line]:
    """All lines of a JSONL file.

    Args:
        path: of the file.
        defaults: for what its lines do not say.
        name: the setting that names it, and its path, for errors.

    Raises:
        PromptError: if the file is absent or empty, or naming the line that is wrong.
    """
    if not path.is_file():
        raise PromptError(f"{name}: there is no such file; give a JSONL of prompts")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines()):
        where = f"{name} line {number + 1}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise PromptError(f"{where}: is not JSON ({error})") from None
        lines.append(parse_line(number, row, path.parent, defaults, where))
    if not lines:
        raise PromptError(f"{name}: is empty; give one prompt a line")
    return lines


def check_sizes(lines: Sequence[Line], model: ModelConfig) -> None:
    """Hold the sizes that lines ask for against the model's position table.

    Raises:
        PromptError: naming the line whose target has no place in it.
    """
    side = model.latent_position_size
    for line in lines:
        if line.size is None:
            continue
        frames = 1 if line.task in (Task.T2I, Task.I_EDIT, Task.S2I) else line.frames or 1
        cells = vae_grid(frames, line.size)
        if (cells[0] - 1) * side**2 + (cells[1] - 1) * side + cells[2] > model.latent_position_frames * side**2:
            raise PromptError(
                f"line {line.number + 1}: latent grid {cells} of size {line.size[0]}x{line.size[1]} and "
                f"{frames} frames exceeds the model's position table of {model.latent_position_frames} x "
                f"{side} x {side}; choose a smaller size or fewer frames"
            )
