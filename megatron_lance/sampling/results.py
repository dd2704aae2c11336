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

import av
import numpy as np
from PIL import Image

from megatron_lance.config.errors import UserError
from megatron_lance.sampling.media import Frames, contact_sheet, picture_grid, write_mp4, write_png
from megatron_lance.sampling.prompt_list import TEXT_KEYS, Layout, Line, options_of

SAMPLES_FILE, SETTINGS_FILE, CHOICES_FILE = "samples.jsonl", "settings.json", "choices.json"
SHEET_SAMPLES, SHEET_COLUMNS = 64, 8
_NOTED = ("task", "line", "copy", "file", "answer")
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
        changed = [f"{k}: {old!r} -> {settings[k]!r}" for k, old in before.items() if settings.get(k, old) != old]
        if changed:
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
        path = self.out / SAMPLES_FILE
        rows = []
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []:
            if not text.endswith("\n"):
                break
            row = json.loads(text)
            own = self.lines[row["line"]].row if row["line"] in self.lines else {}
            if any(row.get(key) != value for key, value in own.items() if key not in _NOTED) or not own:
                raise UserError(
                    f"--out {self.out}: its sample of line {row['line'] + 1} was made of another prompt; go on with "
                    "the same list, or take another folder"
                )
            if "answer" in row or (self.out / row["file"]).is_file():
                rows.append(row)
        return rows

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
        suffix, text = ".png" if len(result) == 1 else ".mp4", " | ".join(line.texts)
        name = line.path(self.layout, copy, suffix, self.copies)
        if self.layout.metadata:
            beside = self.out / self.layout.metadata.format(number=line.number)
            self._move(beside, json.dumps(line.row, ensure_ascii=False) + "\n")
        if self.layout.source:
            self._copy_source(line, self.out / line.place(self.layout.source))
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
            row = {**line.row, "task": str(line.task), "line": line.number, "copy": copy, **found}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """The contact sheet of the first samples, and what was chosen of given options beside what is right."""
        rows = [json.loads(text) for text in (self.out / SAMPLES_FILE).read_text(encoding="utf-8").splitlines()]
        shown = [row for row in rows if "file" in row][:SHEET_SAMPLES]
        pairs = [(_read(self.out / row["file"]), _text(row)) for row in shown]
        if pairs:
            contact_sheet(pairs, columns=SHEET_COLUMNS).save(self.out / "contact_sheet.png")
        choices = [
            {"pred": row["answer"], "gt": right, "task_type": row.get("task_type", "")}
            for row in rows
            if "answer" in row and (right := _right_option(self.lines[row["line"]])) is not None
        ]
        if choices:
            self._move(self.out / CHOICES_FILE, json.dumps({"res_list": choices}, ensure_ascii=False, indent=1) + "\n")


def _right_option(line: Line) -> str | None:
    """The right one of a line's options as it was offered; None if the line does not say it."""
    candidates, answer = line.row.get("candidates"), line.row.get("answer")
    return options_of(candidates)[candidates.index(answer)] if candidates and answer in candidates else None


def _text(row: dict[str, Any]) -> str:
    return next((row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), "")


def _read(path: Path) -> Frames:
    """A written sample."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path))[None]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
