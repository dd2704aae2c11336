"""Score the demo's samples by a program: `python -m tools.judge_demo SAMPLES [--json FILE]`.

SAMPLES is a folder written by tools/sample.py from heldout_generation.jsonl.  Colour, shape and position or direction
are read off the pixels and compared with the caption's; captions are combinations that no training row had.
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
from tools.demo_shapes import chance, correct, judge


def read_frames(path: Path) -> npt.NDArray[np.uint8]:
    """Frames uint8 [T, H, W, 3] of a .png or .mp4."""
    if path.suffix == ".png":
        return np.asarray(Image.open(path).convert("RGB"))[None]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def score(folder: Path) -> dict[str, Any]:
    """Share of right answers per attribute with its chance level, for pictures and clips.

    Raises:
        UserError: if the folder holds no judged samples.
    """
    listing = folder / "samples.jsonl"
    if not listing.is_file():
        raise UserError(f"{folder}: has no samples.jsonl; give a folder written by tools/sample.py")
    answers: dict[str, list[dict[str, bool]]] = {}
    for line in listing.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "expected" not in row:
            raise UserError(f"{listing}: {row['file']} has no expected attributes; sample heldout_generation.jsonl")
        answers.setdefault(row["task"], []).append(correct(judge(read_frames(folder / row["file"])), row["expected"]))
    result: dict[str, Any] = {}
    for task, rows in answers.items():
        levels = chance(moves=task != "t2i")
        shares = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        result[task] = {"samples": len(rows), "right": shares, "chance": {name: levels[name] for name in shares}}
    return result


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("samples", type=Path, help="folder written by tools/sample.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores there")
    options = parser.parse_args()
    result = score(options.samples)
    for task, values in result.items():
        parts = [f"{n} {right:.0%} (chance {values['chance'][n]:.0%})" for n, right in values["right"].items()]
        print(f"{task}: {values['samples']} held-out captions: " + ", ".join(parts))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("judge_demo", main))
