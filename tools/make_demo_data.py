"""Write the demo's data set: `python -m tools.make_demo_data OUT [--seed 1 --pictures 4000 --clips 1200]`.

Real .jpg and .mp4 files as bytes in parquet files of the public schema (coloured shapes with captions, edits,
references, questions), a byte-level BPE tokenizer trained on their texts, a held-out set of combinations that no
training row shows, and some of the media as loose files to look at.  The same arguments give the same rows.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from megatron_lance.config.errors import UserError, run_command
from megatron_lance.config.schema import PromptConfig
from megatron_lance.packing.rng import stream
from tools.demo_shapes import (
    CLIP_FPS,
    CLIP_TEMPLATES,
    COLOURS,
    PICTURE_TEMPLATES,
    POSITION_PHRASES,
    SHAPES,
    Scene,
    UInt8Array,
    caption,
    draw,
    random_scene,
)
from tools.demo_tokenizer import VOCAB_SIZE, train_tokenizer, write_tokenizer

PROMPTS = PromptConfig(
    generation="Draw the {v}.",
    generation_image_inference="Draw the image.",
    editing="Edit the {v}.",
    subject="Draw a new {v} of it.",
    captioning="Describe the {v}.",
    understanding="Look at the {v}.",
)
"""The demo's system prompts; its configuration has the same."""
LOOSE = 3
"""Rows of each file whose media are also written as loose files."""
_README = """Coloured shapes: the data set of the demo, made by tools/make_demo_data.py (seed {seed}).

*.parquet       training rows in the public Lance schema; media are .jpg and .mp4 files as bytes
tokenizer/      byte-level BPE of at most {vocab} tokens, trained on the texts of these rows
heldout.jsonl   prompts to test a model with, and what it should make of them; media paths start at this folder.
                Each wants a (colour, shape, place) that no training row shows or names
preview.jsonl   a few of them, of every task, to sample while training
media/          the media of the first rows, to look at; media/heldout/ holds the inputs of heldout.jsonl

{rows}
"""

Row = dict[str, Any]


def encode_picture(pixels: UInt8Array) -> bytes:
    """A JPEG file of [1, H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(pixels[0]).save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()


def encode_clip(pixels: UInt8Array) -> bytes:
    """An MP4 file with H.264 of [T, H, W, 3]."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # No B-frames: with them x264 now and then writes other bytes for the same frames.
        options = {"crf": "16", "preset": "veryfast", "threads": "1", "bf": "0"}
        stream = container.add_stream("libx264", rate=Fraction(CLIP_FPS), options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


@dataclass(frozen=True)
class Look:
    """How scenes are drawn.

    Attributes:
        size: side of the frames, pixels.
        variety: of what captions do not name, 0 to 1, see `Scene.calmed`.
    """

    size: int = 64
    variety: float = 1.0

    def pixels(self, scene: Scene) -> UInt8Array:
        """[T, size, size, 3] RGB."""
        return draw(scene.calmed(self.variety), self.size)

    def media(self, scene: Scene) -> bytes:
        """The file that shows a scene."""
        pixels = self.pixels(scene)
        return encode_clip(pixels) if scene.moves else encode_picture(pixels)


def trained_scene(rng: np.random.Generator, moves: bool) -> Scene:
    """A scene that may appear in training rows."""
    scene = random_scene(rng, moves)
    while scene.held_out:
        scene = random_scene(rng, moves)
    return scene


def recolour(rng: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """(instruction, result)."""
    colour = str(rng.choice([name for name in COLOURS if name != scene.colour]))
    words = ("Make it {}.", "Change the colour to {}.")[int(rng.integers(2))]
    return words.format(colour), replace(scene, colour=colour)


def reshape(rng: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """(instruction, result)."""
    shape = str(rng.choice([name for name in SHAPES if name != scene.shape]))
    words = ("Make it a {}.", "Turn it into a {}.")[int(rng.integers(2))]
    return words.format(shape), replace(scene, shape=shape)


def mirror(rng: np.random.Generator, scene: Scene) -> tuple[str, Scene]:
    """(instruction, result)."""
    return ("Mirror it.", "Swap left and right.")[int(rng.integers(2))], scene.mirrored()


def edit(rng: np.random.Generator, moves: bool, held_out: bool) -> tuple[Scene, str, Scene]:
    """(source, instruction, target); the source is a trained combination, the target is if not `held_out`."""
    kinds: tuple[Callable[..., tuple[str, Scene]], ...] = (recolour, mirror) if moves else (recolour, mirror, reshape)
    change = kinds[int(rng.integers(len(kinds)))]
    while True:
        source = trained_scene(rng, moves)
        instruction, target = change(rng, source)
        if target.attributes != source.attributes and target.held_out == held_out:
            return source, instruction, target


def reference(rng: np.random.Generator, held_out: bool) -> tuple[Scene, str, Scene]:
    """(reference picture, caption, target): the same object elsewhere, on another background."""
    while True:
        source, other = trained_scene(rng, False), random_scene(rng, False)
        target = replace(other, colour=source.colour, shape=source.shape, radius=source.radius)
        if target.place != source.place and target.held_out == held_out:
            words = ("The same object {}.", "This object {}.")[int(rng.integers(2))]
            return source, words.format(POSITION_PHRASES[target.place]), target


def question(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """(question, answer); without a question the answer is a caption."""
    if scene.moves:
        where = ("Which way does it move?", f"It moves {scene.place}.")
    else:
        where = ("Where is it?", f"It is {POSITION_PHRASES[scene.place]}.")
    pairs = (
        ("What colour is the shape?", f"It is {scene.colour}."),
        ("Which shape is it?", f"It is a {scene.shape}."),
        where,
        ("", caption(scene, 0)),
    )
    return pairs[int(rng.integers(len(pairs)))]


def _text2image(rng: np.random.Generator, look: Look) -> Row:
    scene = trained_scene(rng, False)
    return {"caption": caption(scene, int(rng.integers(len(PICTURE_TEMPLATES)))), "image_bytes": look.media(scene)}


def _text2video(rng: np.random.Generator, look: Look) -> Row:
    scene = trained_scene(rng, True)
    return {"caption": caption(scene, int(rng.integers(len(CLIP_TEMPLATES)))), "video_bytes": look.media(scene)}


def _image2image(rng: np.random.Generator, look: Look) -> Row:
    source, instruction, target = edit(rng, False, held_out=False)
    return {
        "caption": instruction,
        "input_image_bytes": look.media(source),
        "output_image_bytes": look.media(target),
    }


def _video2video(rng: np.random.Generator, look: Look) -> Row:
    source, instruction, target = edit(rng, True, held_out=False)
    return {
        "caption": instruction,
        "input_video_bytes": look.media(source),
        "output_video_bytes": look.media(target),
    }


def _interleave(rng: np.random.Generator, look: Look) -> Row:
    source, words, target = reference(rng, held_out=False)
    return {
        "interleave_array": [look.media(source), words.encode(), look.media(target)],
        "element_dtype_array": ["image", "text", "image"],
    }


def _x2t(rng: np.random.Generator, look: Look, moves: bool) -> Row:
    scene = trained_scene(rng, moves)
    ask, answer = question(rng, scene)
    system = _system("understanding" if ask else "captioning", "video" if moves else "image")
    column = "video_bytes" if moves else "image_bytes"
    return {column: look.media(scene), "caption_i": system, "caption_q": ask, "caption_a": answer}


def _system(prompt: str, kind: str) -> str:
    return str(getattr(PROMPTS, prompt)).replace("{v}", kind)


# File name without suffix -> (how a row is made, whether its rows are counted by --clips, one row per how many).
TABLES: dict[str, tuple[Callable[[np.random.Generator, Look], Row], bool, int]] = {
    "text2image": (_text2image, False, 1),
    "text2video": (_text2video, True, 1),
    "image2image": (_image2image, False, 4),
    "video2video": (_video2video, True, 4),
    "interleave_subject": (_interleave, False, 4),
    "x2t_image": (lambda rng, look: _x2t(rng, look, False), False, 4),
    "x2t_video": (lambda rng, look: _x2t(rng, look, True), True, 4),
}


def _texts(row: Row) -> Iterator[str]:
    """The texts of a training row."""
    for value in row.values():
        if isinstance(value, str):
            yield value
    for value, kind in zip(row.get("interleave_array", ()), row.get("element_dtype_array", ()), strict=True):
        if kind == "text":
            yield value.decode()


def _loose(folder: Path, stem: str, row: Row) -> None:
    """The media of a row as files."""
    named = {name: value for name, value in row.items() if isinstance(value, bytes)}
    for i, (value, kind) in enumerate(
        zip(row.get("interleave_array", ()), row.get("element_dtype_array", ()), strict=True)
    ):
        if kind != "text":
            named[f"{i}_{kind}_bytes"] = value
    for name, value in named.items():
        suffix = "mp4" if "video" in name else "jpg"
        (folder / f"{stem}_{name.removesuffix('_bytes')}.{suffix}").write_bytes(value)


def write_tables(out: Path, seed: int, pictures: int, clips: int, look: Look, progress: bool) -> list[str]:
    """Write the parquet files and some loose media; returns all texts of the rows, with repetitions."""
    counts = {name: max(1, (clips if moves else pictures) // per) for name, (_, moves, per) in TABLES.items()}
    texts: list[str] = []
    with tqdm(total=sum(counts.values()), desc="demo data", unit="row", disable=not progress) as bar:
        for name, (make, _, _) in TABLES.items():
            rows = []
            for i in range(counts[name]):
                rows.append(make(stream(seed, "demo", name, i), look))
                bar.update()
            for i, row in enumerate(rows[:LOOSE]):
                _loose(out / "media", f"{name}_{i}", row)
            pq.write_table(pa.Table.from_pylist(rows), out / f"{name}.parquet", row_group_size=500)
            texts += [text for row in rows for text in _texts(row)]
    return texts


def _combinations(rng: np.random.Generator, moves: bool) -> list[Scene]:
    """One scene for each held-out combination, in random order."""
    found: dict[tuple[str, ...], Scene] = {}
    wanted = len(COLOURS) * len(SHAPES)  # one place for each
    while len(found) < wanted:
        scene = random_scene(rng, moves)
        if scene.held_out:
            found.setdefault(tuple(scene.attributes.values()), scene)
    return list(found.values())


def write_heldout(out: Path, seed: int, look: Look) -> list[str]:
    """Write heldout.jsonl and its media; returns its captions and questions.

    preview.jsonl repeats its first three lines and the first of every other task, to sample while training.

    Lines: task, caption, expected (attributes of the target; for questions the answer), media (paths from `out`).
    """
    lines: list[Row] = []

    def add(task: str, words: str, expected: dict[str, str], *inputs: UInt8Array) -> None:
        paths = []
        for k, pixels in enumerate(inputs):
            path = Path("media", "heldout", f"{task}_{len(lines):03d}_{k}.{'mp4' if len(pixels) > 1 else 'jpg'}")
            (out / path).write_bytes(encode_clip(pixels) if len(pixels) > 1 else encode_picture(pixels))
            paths.append(path.as_posix())
        lines.append({"task": task, "caption": words, "expected": expected, "media": paths})

    for template in range(len(PICTURE_TEMPLATES)):
        for scene in _combinations(stream(seed, "demo", "t2i", template), False):
            add("t2i", caption(scene, template), scene.attributes)
    for task, template in (("t2v", 0), ("t2v", 1), ("i2v", 0)):
        for scene in _combinations(stream(seed, "demo", task, template), True):
            inputs = (look.pixels(scene)[:1],) if task == "i2v" else ()
            add(task, caption(scene, template), scene.attributes, *inputs)
    for task in ("i_edit", "v_edit", "s2i"):
        for i in range(18):
            rng = stream(seed, "demo", task, i)
            source, words, target = reference(rng, True) if task == "s2i" else edit(rng, task == "v_edit", True)
            add(task, words, target.attributes, look.pixels(source))
    for task in ("i2t", "v2t"):
        rng = stream(seed, "demo", task)
        for scene in _combinations(rng, task == "v2t"):
            ask, answer = question(rng, scene)
            add(task, ask, {"answer": answer}, look.pixels(scene))
    tasks = [line["task"] for line in lines]
    shown = [line for number, line in enumerate(lines) if number < 3 or line["task"] not in tasks[:number]]
    for name, chosen in (("heldout", lines), ("preview", shown)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chosen), encoding="utf-8")
    return [line["caption"] for line in lines]


def template_texts() -> list[str]:
    """What the chat template and the system prompts add to the rows, each as often as some hundred rows would."""
    prompts = [_system(name, kind) for name in vars(PROMPTS) for kind in ("image", "video")]
    return [f"{role}\n" for role in ("system", "user", "assistant")] * 500 + prompts * 100


def make(out: Path, seed: int, pictures: int, clips: int, look: Look, progress: bool = True) -> dict[str, int]:
    """Write the whole data set into `out`; returns the rows of each parquet file."""
    for folder in ("media/heldout", "tokenizer"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    texts = write_tables(out, seed, pictures, clips, look, progress)
    heldout = write_heldout(out, seed, look)
    write_tokenizer(out / "tokenizer", train_tokenizer([*texts, *heldout, *template_texts()]))
    rows = {name: pq.read_metadata(out / f"{name}.parquet").num_rows for name in TABLES}
    counts = "\n".join(f"{name}.parquet: {n} rows" for name, n in rows.items())
    (out / "README.txt").write_text(
        _README.format(seed=seed, vocab=VOCAB_SIZE, rows=f"{counts}\nheldout.jsonl: {len(heldout)} rows"),
        encoding="utf-8",
    )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="names the rows (default 1)")
    parser.add_argument("--pictures", type=int, default=4000, metavar="N", help="rows of text2image (default 4000)")
    parser.add_argument("--clips", type=int, default=1200, metavar="N", help="rows of text2video (default 1200)")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="side of the frames (default 64)")
    parser.add_argument(
        "--variety", type=float, default=1.0, help="of sizes, places and backgrounds that no caption names, 0 to 1"
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)
    for name in ("pictures", "clips"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be positive; set 1 or more")
    if args.size < 32 or args.size % 16:
        raise UserError(f"--size {args.size}: must be a multiple of 16 pixels and at least 32; 64 is the demo's")
    if not 0.0 <= args.variety <= 1.0:
        raise UserError(f"--variety {args.variety:g}: must lie in [0, 1]; 1 is all there is")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"OUT '{args.out}': is a file; name a folder")
    if args.out.is_dir() and any(args.out.iterdir()) and not args.force:
        raise UserError(f"OUT '{args.out}': is not empty; name another folder or give --force to write into it")
    rows = make(args.out, args.seed, args.pictures, args.clips, Look(args.size, args.variety), progress=not args.quiet)
    print(f"{args.out}: " + ", ".join(f"{name} {n}" for name, n in rows.items()) + " rows")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("make_demo_data", main))
