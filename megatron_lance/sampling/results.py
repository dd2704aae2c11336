"""The folder that a prompt list is sampled into.

Station: engine -> [files in a benchmark's layout, samples.jsonl] -> scoring programs.  A file is moved to its place
when it is whole, and noted in samples.jsonl after that, so a run that was killed at any moment goes on from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_lance.config.errors import UserError
from megatron_lance.packing.sample import Task
from megatron_lance.sampling.layouts import SUFFIXES, Layout
from megatron_lance.sampling.media import Frames, contact_sheet, picture_grid, shown_frames, write_mp4, write_png
from megatron_lance.sampling.prompt_list import Line, options_of

SAMPLES_FILE, SETTINGS_FILE, CHOICES_FILE = "samples.jsonl", "settings.json", "choices.json"
SHEET_SAMPLES, SHEET_COLUMNS = 64, 8
_OWN = ("task", "line", "copy", "file", "answer")
"""Fields of samples.jsonl that stand for those of a prompt of the same name."""


class Results:
    """Writes samples; of several ranks only the first has one.

    Args:
        out: the folder.
        layout: where files go.
        copies: per prompt.
        fps: of clips.
        lines: the whole list.
    """

    def __init__(self, out: Path, layout: Layout, copies: int, fps: float, lines: Sequence[Line]) -> None:
        self.out, self.layout, self.copies, self.fps = out, layout, copies, fps
        self.lines = {line.number: line for line in lines}
        self.grids: dict[int, list[Frames]] = {}

    def open(self, settings: Mapping[str, Any]) -> set[tuple[int, int]]:
        """Make the folder, or go on with it.

        Args:
            settings: what decides the samples, as plain JSON values.

        Returns:
            (line, copy) of the samples that are there.

        Raises:
            UserError: if those were made with other settings or of another list.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / SETTINGS_FILE
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        now = json.loads(json.dumps(settings))  # tuples are lists there
        if changed := [f"{key}: {old!r} -> {now[key]!r}" for key, old in before.items() if now.get(key, old) != old]:
            raise UserError(
                f"--out {self.out}: its samples were made with other settings, {'; '.join(changed)}; use those again, "
                "or another folder"
            )
        self._move(path, json.dumps(settings, indent=1) + "\n")
        rows = self._noted()
        self._move(self.out / SAMPLES_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        copies = range(self.copies)
        return {(row["line"], copy) for row in rows for copy in (copies if self.layout.grid else [row["copy"]])}

    def _noted(self) -> list[dict[str, Any]]:
        """What a run before has noted and whose file is there; a line torn by a kill is left out."""
        rows = []
        for row in _rows(self.out / SAMPLES_FILE):
            line = self.lines.get(row["line"])
            if line is None or any(row.get(key) != value for key, value in self._noted_of(line).items()):
                raise UserError(
                    f"--out {self.out}: its sample of line {row['line'] + 1} was made of another prompt; go on with "
                    "the same list, or take another folder"
                )
            if not Task(row["task"]).is_generation or (self.out / row["file"]).is_file():
                rows.append(row)
        return rows

    def _noted_of(self, line: Line) -> dict[str, Any]:
        """What a sample's note repeats of its line."""
        return {**{key: value for key, value in line.row.items() if key not in _OWN}, "task": str(line.task)}

    def add(self, line: Line, copy: int, result: Frames | str) -> None:
        """Write a sample; the copies of a grid wait for one another."""
        if isinstance(result, str):
            self._note(line, copy, answer=result)
            return
        if self.layout.grid:
            together = self.grids.setdefault(line.number, [])
            together.append(result)
            if len(together) < self.copies:
                return
            result = picture_grid(self.grids.pop(line.number))
        suffix, text = SUFFIXES["image" if len(result) == 1 else "video"], " | ".join(line.texts)
        name = self.layout.path_of(line, copy, suffix, self.copies)
        if self.layout.metadata:
            beside = self.layout.place(self.layout.metadata, line, copy, suffix, self.copies)
            self._move(self.out / beside, json.dumps(line.row, ensure_ascii=False) + "\n")
        if self.layout.source and line.media:
            beside = self.layout.place(self.layout.source, line, copy, suffix, self.copies)
            self._copy_source(line, self.out / beside)
        partial = self.out / f".partial{suffix}"
        if len(result) == 1:
            write_png(partial, result[0], text)
        else:
            write_mp4(partial, result, self.fps, text)
        self._place(partial, self.out / name)
        self._note(line, copy, file=name)

    def _copy_source(self, line: Line, path: Path) -> None:
        """The picture that is edited, as PNG."""
        partial = self.out / ".partial.png"
        with Image.open(line.media[0]) as picture:
            picture.convert("RGB").save(partial)
        self._place(partial, path)

    def _place(self, partial: Path, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, path)

    def _move(self, path: Path, text: str) -> None:
        """Write a text file at once."""
        partial = self.out / ".partial"
        partial.write_text(text, encoding="utf-8")
        self._place(partial, path)

    def _note(self, line: Line, copy: int, **found: str) -> None:
        with (self.out / SAMPLES_FILE).open("a", encoding="utf-8") as lines:
            row = {**self._noted_of(line), "line": line.number, "copy": copy, **found}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """The contact sheet of some samples, and what was chosen of given options beside what is right."""
        rows = _rows(self.out / SAMPLES_FILE)
        shown = spread([row for row in rows if Task(row["task"]).is_generation], SHEET_SAMPLES)
        if shown:
            pairs = [(shown_frames(self.out / row["file"]), " | ".join(self.lines[row["line"]].texts)) for row in shown]
            contact_sheet(pairs, columns=SHEET_COLUMNS).save(self.out / "contact_sheet.png")
        choices = [
            {"pred": row["answer"], "gt": right, "task_type": row.get("task_type", "")}
            for row in rows
            if not Task(row["task"]).is_generation and (right := _right_option(self.lines[row["line"]])) is not None
        ]
        if choices:
            self._move(self.out / CHOICES_FILE, json.dumps({"res_list": choices}, ensure_ascii=False, indent=1) + "\n")


def _right_option(line: Line) -> str | None:
    """The right one of a line's options as it was offered; None if the line does not say it."""
    candidates, answer = line.row.get("candidates"), line.row.get("answer")
    return options_of(candidates)[candidates.index(answer)] if candidates and answer in candidates else None


def spread(rows: Sequence[Any], most: int) -> Sequence[Any]:
    """Up to `most` of them, evenly from the first on, so that a list sorted by task shows every task."""
    return rows[:: max(1, -(-len(rows) // most))]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The samples that are noted in a file, if it is there; a line torn by a kill is left out."""
    if not path.is_file():
        return []
    *whole, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # texts may hold other ends of line
    return [json.loads(text) for text in whole]
