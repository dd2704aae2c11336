"""Prompt lists: a JSONL of prompts.

Station: JSONL -> [lines] -> engine -> files.  A line is an object with a text (caption, prompt, prompt_en, instruction
or question; of an understanding task the question before others), for conditions the paths of media (media, image,
images, input_image, video, first_frame, last_frame), and optionally task, size, frames, seed, turns (a list of further
instructions), candidates (options of a question).  Other fields are kept; null is as good as none.
"""

from __future__ import annotations

import codecs
import json
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lance.config.schema import ModelConfig
from megatron_lance.data.sizes import has_positions, vae_grid
from megatron_lance.packing.sample import Task
from megatron_lance.sampling.requests import Prompt, PromptError

TEXT_KEYS = ("caption", "prompt", "prompt_en", "instruction", "question")
CHOOSE = "Answer with the letter of the best option."
"""What a question with options ends with."""
MEDIA_KEYS = ("media", "images", "image", "input_image", "video", "first_frame", "last_frame")
SETTING_KEYS = ("task", "size", "frames", "seed", "turns", "candidates")


@dataclass(frozen=True)
class Line:
    """One line of a list.

    Attributes:
        number: from 0, blank lines counted.
        row: the object.
        task: of the line.
        texts: of each turn; one unless it is a multi-turn edit.
        media: paths of the conditions.
        size: (H, W) or None.
        frames: or None.
        seed: of its first copy.
        where: the list and line, for errors.
    """

    number: int
    row: Mapping[str, Any]
    task: Task
    texts: tuple[str, ...]
    media: tuple[Path, ...]
    size: tuple[int, int] | None
    frames: int | None
    seed: int
    where: str

    def prompt(self, turn: int, media: tuple[bytes, ...]) -> Prompt:
        """What is sampled in a turn; its name addresses the noise."""
        name = f"line {self.number}" if turn == 0 else f"line {self.number} turn {turn}"
        return Prompt(name, self.task, self.texts[turn], media, self.size, self.frames, self.where)

    def read_media(self) -> tuple[bytes, ...]:
        """The files of its conditions.

        Raises:
            PromptError: if one cannot be read.
        """
        try:
            return tuple(path.read_bytes() for path in self.media)
        except OSError as error:
            raise PromptError(f"{self.where}: {error}; its files must stay where they are") from None


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


def parse_size(text: Any, where: str) -> tuple[int, int]:
    """(H, W) of "HxW".

    Raises:
        PromptError: unless both are positive multiples of 16.
    """
    match = re.fullmatch(r"([0-9]+)x([0-9]+)", text) if isinstance(text, str) else None
    if not match:
        raise PromptError(f"{where} {text!r}: must be HxW in pixels, for example 480x848")
    height, width = int(match[1]), int(match[2])
    if height % 16 or width % 16 or height < 16 or width < 16:
        raise PromptError(f"{where} {text!r}: both sides must be positive multiples of 16")
    return height, width


def check_frames(frames: Any, where: str) -> int:
    """`frames`, if it is 4k+1.

    Raises:
        PromptError: otherwise.
    """
    if type(frames) is not int or frames < 1 or frames % 4 != 1:
        raise PromptError(f"{where} {frames!r}: must be 4k+1, for example 1, 5, 9 or 73")
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
    given = {key: value for key, value in row.items() if value is not None}
    _check_names(given, (*MEDIA_KEYS, *SETTING_KEYS), where)
    name = given.get("task", defaults.task)
    if name not in list(Task):
        raise PromptError(f"{where}: task {name!r}: must be one of {', '.join(Task)}; give it or --task")
    task = Task(name)
    text = _text(given, task, where)
    if "candidates" in given:
        text = _multiple_choice(text, given["candidates"], where)
    size = parse_size(given["size"], f"{where}: size") if "size" in given else defaults.size
    frames = check_frames(given["frames"], f"{where}: frames") if "frames" in given else defaults.frames
    seed, turns = given.get("seed", defaults.seed), given.get("turns", [])
    if type(seed) is not int:
        raise PromptError(f"{where}: seed {seed!r}: must be a whole number; correct it")
    if not isinstance(turns, list) or not all(isinstance(turn, str) and turn for turn in turns):
        raise PromptError(f"{where}: turns {turns!r}: must be a list of instructions; write texts that are not empty")
    if turns and not task.is_edit:
        raise PromptError(f"{where}: turns belong to edits; task {task} has none")
    return Line(number, row, task, (text, *turns), _media(given, folder, where), size, frames, seed, where)


def _check_names(given: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """Look for fields that are meant to have one of these names and are misspelt.

    Raises:
        PromptError: naming the field and what it may mean.
    """
    for field in (key for key in given if key not in (*TEXT_KEYS, *MEDIA_KEYS, *SETTING_KEYS)):
        for name in names:
            if name not in given and _is_slip(field, name):
                raise PromptError(f"{where}: field {field!r}: is unknown; write {name!r} if meant, or leave it out")


def _is_slip(word: str, name: str) -> bool:
    """Whether they differ by case, by one letter too many or too few, or by two neighbours that are swapped."""
    if word.lower() == name:
        return True
    start = len(os.path.commonprefix([word, name]))
    word, name = word[start:], name[start:]
    end = len(os.path.commonprefix([word[::-1], name[::-1]]))
    word, name = word[: len(word) - end], name[: len(name) - end]
    return len(word) + len(name) == 1 or (len(word) == 2 and word == name[::-1])


def _text(given: Mapping[str, Any], task: Task, where: str) -> str:
    """The caption, instruction or question.

    Raises:
        PromptError: if there is none.
    """
    keys = TEXT_KEYS if task.is_generation else ("question", *TEXT_KEYS)
    found = [given[key] for key in keys if isinstance(given.get(key), str)]
    text = found[0] if found and not task.is_generation else next(filter(None, found), "")
    if text or task in (Task.I2T, Task.V2T):  # captioning has no question
        return text
    _check_names(given, TEXT_KEYS, where)
    raise PromptError(f"{where}: has no text; give one of {', '.join(TEXT_KEYS)}")


def _media(given: Mapping[str, Any], folder: Path, where: str) -> tuple[Path, ...]:
    """The files of the conditions, in the order of MEDIA_KEYS.

    Raises:
        PromptError: naming what is no path or no file.
    """
    paths: list[Path] = []
    for key in MEDIA_KEYS:
        value = given.get(key, [])
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise PromptError(f"{where}: {key} {value!r}: must be the path of a file or a list of paths; correct it")
        for path in (folder / name for name in names):
            if not path.is_file():
                raise PromptError(f"{where}: {key}: there is no file {path}; relative paths start at {folder}/")
            paths.append(path)
    if "last_frame" in given and len(paths) == 1:
        raise PromptError(f"{where}: last_frame: comes alone; give the first_frame too")
    return tuple(paths)


def options_of(candidates: Sequence[str]) -> list[str]:
    """Options of a multiple choice with their letters."""
    return [f"({chr(ord('A') + number)}) {text}" for number, text in enumerate(candidates)]


def _multiple_choice(question: str, candidates: Any, where: str) -> str:
    """The question with its options.

    Raises:
        PromptError: unless they are a list of up to 26 texts.
    """
    if not isinstance(candidates, list) or not 1 < len(candidates) <= 26 or any(type(c) is not str for c in candidates):
        raise PromptError(f"{where}: candidates {candidates!r}: must be a list of 2 to 26 texts; correct it")
    return "\n".join([question, *options_of(candidates), CHOOSE])


def read_list(path: Path, defaults: Defaults, name: str) -> list[Line]:
    """All lines of a JSONL file; blank ones are passed over.

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
    # not splitlines: JSON may hold other ends of line than this one as they are
    for number, text in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")):
        where = f"{name} line {number + 1}"
        try:
            row = json.loads(text) if text.strip() else None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PromptError(f"{where}: is not JSON in UTF-8 ({error}); write one object a line") from None
        if text.strip():
            lines.append(parse_line(number, row, path.parent, defaults, where))
    if not lines:
        raise PromptError(f"{name}: is empty; give one prompt a line")
    return lines


def check_grid(grid: tuple[int, int, int], model: ModelConfig, where: str) -> None:
    """Hold a latent grid against the model's position table.

    Raises:
        PromptError: if it has no place in it.
    """
    side = model.latent_position_size
    if not has_positions(grid, model.latent_position_frames, side):
        raise PromptError(
            f"{where}: latent grid {grid} of {16 * grid[1]}x{16 * grid[2]} pixels and {4 * grid[0] - 3} frames exceeds "
            f"the model's position table of {model.latent_position_frames} x {side} x {side}; choose a smaller size or "
            "fewer frames"
        )


def check_sizes(lines: Sequence[Line], model: ModelConfig) -> None:
    """Hold the sizes that lines ask for against the model's position table.

    Raises:
        PromptError: naming the line whose target has no place in it.
    """
    for line in lines:
        if line.size is not None:
            frames = line.frames or 1 if line.task.makes == "video" else 1
            check_grid(vae_grid(frames, line.size), model, line.where)
