"""A tiny run that needs nothing from outside: real media in parquet files, a tokenizer, a configuration, a pack index.

Pictures are one coloured square on grey; in clips it moves.  Everything is made from fixed values, so two makings are
equal.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_lance.checkpoint.hf_lance import RandomSource, public_shapes
from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import ModelConfig, PromptConfig, RunConfig
from megatron_lance.data.prepack import prepack
from tests.shared import REPOSITORY

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220), "yellow": (230, 220, 50)}
SIDE, ROWS, FRAMES, FPS = 72, 4, 9, 12
"""Pixels of a picture's side, rows of each parquet file, frames of a clip and their rate."""


@dataclass(frozen=True)
class TinyRun:
    """What `make_tiny_run` made.

    Attributes:
        folder: holds all of it; tests that change something copy it or work on files of their own.
        config: YAML file, one rank, already prepacked; `training.run_dir` is to be overridden.
    """

    folder: Path
    config: Path

    def load(self, *overrides: str) -> RunConfig:
        """The configuration with overrides."""
        return load_config([str(self.config)], overrides)


def _frame(colour: str, left: int) -> np.ndarray:
    """Uint8 [SIDE, SIDE, 3]."""
    pixels = np.full((SIDE, SIDE, 3), 128, np.uint8)
    pixels[24:48, left : left + 24] = COLOURS[colour]
    return pixels


def jpeg(colour: str, left: int = 24) -> bytes:
    """A picture of a square."""
    file = io.BytesIO()
    Image.fromarray(_frame(colour, left)).save(file, "JPEG", quality=95)
    return file.getvalue()


def mp4(colour: str, frames: int = FRAMES) -> bytes:
    """An H.264 clip of a square that moves to the right."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "threads": "1"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_frame(colour, 4 * i), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def tables() -> dict[str, dict[str, list[str] | list[bytes]]]:
    """Columns of each parquet file, by its name; ROWS rows each."""
    colours = list(COLOURS)[:ROWS]
    pictures = [jpeg(c) for c in colours]
    return {
        "text2image": {"caption": [f"a {c} square" for c in colours], "image_bytes": pictures},
        "text2video": {
            "caption": [f"a {c} square moves to the right" for c in colours],
            "video_bytes": list(map(mp4, colours)),
        },
        "x2t_image": {
            "image_bytes": pictures,
            "caption_i": ["Answer with one word."] * ROWS,
            "caption_q": ["Which colour has the square?"] * ROWS,
            "caption_a": list(colours),
        },
    }


TASKS = {"text2image": "t2i", "text2video": "t2v", "x2t_image": "i2t"}


def write_table(path: Path, columns: dict[str, list[str] | list[bytes]]) -> Path:
    """A parquet file of these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False)
    return path


def write_tokenizer(folder: Path, vocab_size: int = 400, special: tuple[str, ...] | list[str] = SPECIAL) -> Path:
    """A byte-level BPE trained on the prompts, with special tokens; returns its folder."""

    def texts() -> Iterator[str]:
        yield from vars(PromptConfig()).values()
        for columns in tables().values():
            yield from (value for values in columns.values() for value in values if isinstance(value, str))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_weights(folder: Path, model: ModelConfig, changes: Mapping[str, torch.Tensor | None]) -> Path:
    """Random weights in the public layout, some tensors replaced or (None) left out; returns the folder."""
    source = RandomSource(1, model)
    tensors = {key: source.get(key, shape) for key, shape in public_shapes(model).items()} | dict(changes)
    folder.mkdir(parents=True)
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    return folder


PROMPTS: tuple[dict[str, object], ...] = (
    {"task": "t2i", "caption": "a red square"},
    {"task": "t2v", "caption": "a blue square moves to the right", "frames": 5},
    {"task": "i2v", "caption": "it moves", "first_frame": "red.jpg"},
    {"task": "i_edit", "instruction": "make it blue", "image": "red.jpg", "turns": ["make it green"]},
    {"task": "v_edit", "instruction": "make it blue", "video": "red.mp4"},
    {"task": "s2i", "caption": "both together", "images": ["red.jpg", "blue.jpg"]},
    {"task": "i2t", "question": "Which colour has the square?", "image": "red.jpg"},
    {"task": "v2t", "question": "", "video": "red.mp4"},
    {"task": "t2t", "question": "Which colour?"},
)
"""One prompt of every task."""


def with_validation(run: TinyRun, folder: Path) -> TinyRun:
    """The run with half of its rows held out, both indices, and PROMPTS in prompts.jsonl, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, medium in {"red.jpg": jpeg("red"), "blue.jpg": jpeg("blue"), "red.mp4": mp4("red")}.items():
        (folder / name).write_bytes(medium)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS), encoding="utf-8")
    settings = {
        "extends": str(run.config),
        "data": {"validation_fraction": 0.5, "pack_index": str(folder / "index")},
        "validation": {"pack_index": str(folder / "held_out"), "interval": 2},
        "preview": {"interval": 2, "height": 32, "width": 32, "frames": 9, "steps": 2, "batch": 3, "max_tokens": 3},
    }
    made = TinyRun(folder, folder / "validation.yaml")
    made.config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    loaded = made.load()
    for held_out in (False, True):
        data = replace(loaded.data, pack_index=str(folder / "held_out")) if held_out else loaded.data
        batch = loaded.training.global_batch_size
        prepack(data, loaded.model, loaded.training.seed, batch, progress=False, held_out=held_out)
    return made


def make_tiny_run(folder: Path) -> TinyRun:
    """Write data set, tokenizer, configuration and pack index under `folder`; takes about a second."""
    for name, columns in tables().items():
        write_table(folder / "data" / f"{name}.parquet", columns)
    sources = [{"name": n, "path": str(folder / "data" / f"{n}.parquet"), "task": t} for n, t in TASKS.items()]
    settings = {
        "extends": str(REPOSITORY / "examples" / "configs" / "tiny.yaml"),
        "data": {
            "sources": sources,
            "tokenizer": str(write_tokenizer(folder / "tokenizer")),
            "pack_index": str(folder / "index"),
            "epochs": 2,
            "seq_length": 512,
            "vae_resolution": 64,
            "vit_resolution": 56,
        },
        "training": {"global_batch_size": 2, "run_dir": str(folder / "run")},
    }
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    run = TinyRun(folder, config)
    loaded = run.load()
    prepack(loaded.data, loaded.model, loaded.training.seed, loaded.training.global_batch_size, progress=False)
    return run
