"""Score the demo's samples by a program: `python -m tools.judge_demo SAMPLES [--data DIR] [--json FILE]`.

SAMPLES is a folder written by tools/sample.py from heldout.jsonl.  Colour, shape and position or direction are read off
the pixels and compared with what the prompt asks for, which are combinations that no training row had; answers are
compared as texts.  With the data set's folder, edits and references also say how a copy of their source would score.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from megatron_lance.config.errors import UserError, run_command
from tools.demo_shapes import COLOURS, DIRECTIONS, POSITIONS, SHAPES, chance, correct, judge


def read_frames(path: Path) -> npt.NDArray[np.uint8]:
    """Frames uint8 [T, H, W, 3] of a .png or .mp4."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path).convert("RGB"))[None]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


PLACES = {"i2t": len(POSITIONS), "v2t": len(DIRECTIONS)}


def answer_chance(task: str, question: str) -> float:
    """Share of right answers of one who knows the question's possible answers and picks one blindly."""
    kinds = {"colour": len(COLOURS), "shape": len(SHAPES), "Where": PLACES[task], "way": PLACES[task]}
    for word, possible in kinds.items():
        if word in question and not (word == "shape" and "colour" in question):
            return 1 / possible
    return 1 / (len(COLOURS) * len(SHAPES) * PLACES[task])


def _answers(task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    right = sum(row["answer"] == row["expected"]["answer"] for row in rows) / len(rows)
    blind = sum(answer_chance(task, row["caption"]) for row in rows) / len(rows)
    return {"samples": len(rows), "right": {"answer": right}, "chance": {"answer": blind}}


def _shares(judged: list[dict[str, bool]]) -> dict[str, float]:
    return {name: sum(row[name] for row in judged) / len(judged) for name in judged[0]}


def score(folder: Path, data: Path | None = None) -> dict[str, Any]:
    """Share of right answers per attribute with its chance level, for every task.

    Args:
        folder: written by tools/sample.py.
        data: of the data set, where the sources of edits and references are; None: they are not judged.

    Raises:
        UserError: if the folder holds no judged samples.
    """
    listing = folder / "samples.jsonl"
    if not listing.is_file():
        raise UserError(f"{folder}: has no samples.jsonl; give a folder written by tools/sample.py")
    tasks: dict[str, list[dict[str, Any]]] = {}
    for line in listing.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "expected" not in row:
            raise UserError(f"{listing}: {row.get('file', row)} has no expected attributes; sample heldout.jsonl")
        tasks.setdefault(row["task"], []).append(row)
    result: dict[str, Any] = {}
    for task, rows in tasks.items():
        if task in PLACES:
            result[task] = _answers(task, rows)
            continue
        right = _shares([correct(judge(read_frames(folder / row["file"])), row["expected"]) for row in rows])
        levels = chance(moves=task in ("t2v", "i2v", "v_edit"))
        result[task] = {"samples": len(rows), "right": right, "chance": {name: levels[name] for name in right}}
        if data is not None and task in ("i_edit", "v_edit", "s2i"):
            sources = [correct(judge(read_frames(data / row["media"][0])), row["expected"]) for row in rows]
            result[task]["copy"] = _shares(sources)
    return result


def describe(task: str, values: dict[str, Any]) -> str:
    """A line of the table."""
    parts = []
    for name, right in values["right"].items():
        copied = f", a copy {values['copy'][name]:.0%}" if "copy" in values else ""
        parts.append(f"{name} {right:.0%} (chance {values['chance'][name]:.0%}{copied})")
    return f"{task}: {values['samples']} held-out captions: " + ", ".join(parts)


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("samples", type=Path, help="folder written by tools/sample.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the data set, to judge a copy of each source too")
    options = parser.parse_args()
    result = score(options.samples, options.data)
    for task, values in result.items():
        print(describe(task, values))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("judge_demo", main))
