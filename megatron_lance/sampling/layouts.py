"""Folder layouts that the benchmarks' own scoring programs read, below OUT.

Station: lines -> [places] -> files.

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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from megatron_lance.packing.sample import Task
from megatron_lance.sampling.prompt_list import Line
from megatron_lance.sampling.requests import PromptError

MAX_NAME = 255
"""Bytes of a file's name."""
SUFFIXES = {"image": ".png", "video": ".mp4"}
"""Of a picture's file and a clip's."""


@dataclass(frozen=True)
class Layout:
    """Where a benchmark expects results.

    Attributes:
        name: on the command line.
        task: of its prompts; None: each line says it.
        copies: samples per prompt.
        path: of a sample below the folder, a format of number, copy, suffix and the line's own fields.
        grid: whether the copies of a prompt become one picture.
        metadata: file beside the samples that repeats the line, a format like `path`; empty: none.
        source: file beside the samples with the picture that is edited, a format like `path`; empty: none.
    """

    name: str
    task: Task | None
    copies: int
    path: str
    grid: bool = False
    metadata: str = ""
    source: str = ""

    def place(self, form: str, line: Line, copy: int, suffix: str, copies: int) -> str:
        """A place below the folder.

        Args:
            form: `path`, `metadata` or `source`.
            line: whose sample it is.
            copy: its number, from 0.
            suffix: of the file, from SUFFIXES.
            copies: per prompt.

        Raises:
            PromptError: if the line lacks a field that names the file, it cannot name one, or the name is too long.
        """
        fields = {
            **({"id": line.row["item_id"]} if "item_id" in line.row else {}),
            **line.row,
            "text": line.row.get("prompt_en", line.texts[0]),
            "number": line.number,
            "copy": copy,
            "suffix": suffix,
            "copy_suffix": f"_{copy}" if copies > 1 else "",
        }
        wanted = [name for _, name, _, _ in Formatter().parse(form) if name]
        name = form.format(**{field: _as_name(field, fields, line) for field in wanted})
        longest = max(len(part.encode()) for part in name.split("/"))
        if longest > MAX_NAME:
            raise PromptError(
                f"{line.where}: the name of its file has {longest} bytes, file systems take {MAX_NAME}; shorten the "
                "text or choose --layout flat"
            )
        return name

    def path_of(self, line: Line, copy: int, suffix: str, copies: int) -> str:
        """The sample's place below the folder; raises PromptError as `place`."""
        return self.place(self.path, line, copy, suffix, copies)


def _as_name(field: str, fields: Mapping[str, object], line: Line) -> object:
    """The value of a field as a part of a file's name.

    Raises:
        PromptError: if it is absent, neither a text nor a whole number, or leads out of the folder.
    """
    if field not in fields:
        raise PromptError(f"{line.where}: has no field {field!r}, which names its file; add it or choose --layout flat")
    value = fields[field]
    if type(value) is int:
        return value
    own = field in line.row or field == "text"
    if not isinstance(value, str) or (own and value.strip() in ("", ".", "..")):
        raise PromptError(
            f"{line.where}: {field} {value!r}: names its file; write a text that can, or a whole number, or choose "
            "--layout flat"
        )
    return re.sub(r"[/\0]", "_", value)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("flat", None, 1, "{number:04d}{copy_suffix}{suffix}"),
        Layout(
            "geneval",
            Task.T2I,
            4,
            "{number:05d}/samples/{copy:05d}{suffix}",
            metadata="{number:05d}/metadata.jsonl",
        ),
        Layout("dpg", Task.T2I, 4, "images/{id}{suffix}", grid=True),
        Layout("vbench", Task.T2V, 5, "videos/{text}-{copy}{suffix}"),
        Layout(
            "gedit",
            Task.I_EDIT,
            1,
            "fullset/{task_type}/{instruction_language}/{key}{suffix}",
            source="fullset/{task_type}/{instruction_language}/{key}_SRCIMG.png",
        ),
        Layout("mvbench", Task.V2T, 1, ""),
    )
}


def check_places(lines: Sequence[Line], layout: Layout, copies: int) -> None:
    """Look whether every sample has a place of its own.

    Raises:
        PromptError: naming the line that has none or whose task the layout does not take, or two that share one.
    """
    owners: dict[str, Line] = {}
    for line in lines:
        if layout.task is not None and line.task.makes != layout.task.makes:
            raise PromptError(
                f"{line.where}: task {line.task}: layout {layout.name} takes {layout.task}; leave the task out or "
                "choose --layout flat"
            )
        if not line.task.is_generation:
            continue
        places = [layout.path_of(line, copies - 1, SUFFIXES[line.task.makes], copies)]
        if layout.source:
            places.append(layout.place(layout.source, line, 0, "", copies))
        for place in places:
            owner = owners.setdefault(place, line)
            if owner is not line:
                raise PromptError(
                    f"{owner.where} and {line.where}: would be written to the same file {place}; leave one out"
                )
