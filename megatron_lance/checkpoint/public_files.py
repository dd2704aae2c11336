"""Folders of safetensors files: read one tensor at a time, written header first.

Station: under import, export and verification of public weights.  A file's header holds every name, type, shape and
offset, so with the shapes known beforehand a file is written front to back and no more than a tensor is in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from megatron_lance.checkpoint.files import partial_folder, publish
from megatron_lance.config.errors import UserError

Shape = tuple[int, ...]
Stream = Iterator[tuple[str, Iterable[torch.Tensor]]]
"""Names in order, each with its tensor in pieces along the first dimension."""

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHOWN = 8
"""Tensors of a kind that an error names before it only counts them."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_BLOCK = 1 << 24
"""Bytes that are converted and written at once."""


class CheckpointError(UserError):
    """Public weights that are unreadable or do not fit the model; names the offending tensors."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size without any header."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name of `target` at the end: it appears complete or not at all.

    Raises:
        CheckpointError: if the disk does not take it; what was written is removed.
    """
    partial = None
    try:
        partial = partial_folder(target)
        yield partial
        publish(partial, target)
    except OSError as error:
        raise CheckpointError(
            f"'{target}': cannot be written ({error}); make room, or correct the folder's name or rights"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


class TensorFolder:
    """The tensors in a folder's safetensors files: those that an index names, or all files there are.

    Args:
        folder: holds one or several *.safetensors files.
        name: what an error calls the folder, for example the setting that names it.

    Attributes:
        specs: of every tensor, by name.

    Raises:
        CheckpointError: if there is no file, or listing everything wrong with names and files.
    """

    def __init__(self, folder: str | Path, name: str = "") -> None:
        self.folder = Path(folder)
        name = name or f"'{folder}'"
        index = _read_index(self.folder / INDEX_FILE)
        files = sorted(set(index.values())) or sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{name}: no *.safetensors file there; give a folder in the public layout")
        problems = [f"{file}: named by {INDEX_FILE}, but missing" for file in files if not self._path(file).is_file()]
        self.specs: dict[str, TensorSpec] = {}
        self.files: dict[str, str] = {}
        for file in files:
            for key, spec in _specs_in(self._path(file)).items() if self._path(file).is_file() else ():
                if key in self.files:
                    problems.append(f"{key}: in {self.files[key]} and in {file}")
                self.specs[key], self.files[key] = spec, file
        there = {file for file in files if self._path(file).is_file()}
        problems += [f"{key}: not in {file}" for key, file in index.items() if file in there and key not in self.specs]
        if problems:
            raise CheckpointError(f"{name}: {shown(problems)}; copy the folder again")

    def _path(self, file: str) -> Path:
        return self.folder / file

    def get(self, key: str) -> torch.Tensor:
        """The tensor of this name, in its own dtype."""
        with safe_open(self._path(self.files[key]), framework="pt") as handle:
            return handle.get_tensor(key)


def shown(problems: list[str]) -> str:
    """The first of a list, and how many more there are."""
    return "; ".join([*problems[:SHOWN], *([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])])


def _read_index(path: Path) -> dict[str, str]:
    """File of each tensor by an index; empty without one."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a readable index ({error!r}); copy it again") from error


def _specs_in(file: Path) -> dict[str, TensorSpec]:
    """Every tensor of a safetensors file."""
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 (no mapping)
            codes = {key: part.get_dtype() for key, part in slices.items()}
            if unknown := [f"{key}: {code}" for key, code in codes.items() if code not in _DTYPES]:
                raise CheckpointError(f"{file}: has types this program does not read: {shown(unknown)}")
            return {key: TensorSpec(tuple(part.get_shape()), _DTYPES[codes[key]]) for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: is not a readable safetensors file ({error}); copy it again") from error


def check_names(wanted: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: counting missing, unknown and misshapen tensors together and naming the first of each.
    """
    misshapen = [
        f"{key}: found {found[key]}, the model needs {shape}"
        for key, shape in wanted.items()
        if key in found and found[key] != shape
    ]
    kinds = {
        "missing": [key for key in wanted if key not in found],
        "unknown": [key for key in found if key not in wanted],
        "misshapen": misshapen,
    }
    problems = [f"{len(items)} {title}: {shown(items)}" for title, items in kinds.items() if items]
    if problems:
        raise CheckpointError(f"weights of {where} do not fit the model. " + ". ".join(problems))


def write_safetensors(path: Path, specs: Mapping[str, TensorSpec], tensors: Stream) -> None:
    """Write a safetensors file front to back.

    Args:
        path: to write.
        specs: of all tensors, in the order they come.
        tensors: of any dtype; converted to their spec's.

    Raises:
        CheckpointError: if a tensor is not the one that its place calls for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, spec in specs.items():
        start, end = end, end + spec.bytes
        header[key] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (key, spec), (found, pieces) in zip(specs.items(), islice(tensors, len(specs)), strict=True):
            rows = _write_pieces(file, spec, pieces) if found == key else -1
            if rows != spec.shape[0]:
                raise CheckpointError(f"{path}: {found} of {rows} rows came in place of {key} {spec.shape}")
        file.flush()
        os.fsync(file.fileno())


def _write_pieces(file: BinaryIO, spec: TensorSpec, pieces: Iterable[torch.Tensor]) -> int:
    """Write a tensor that comes in pieces; returns its rows, -1 if a piece has another shape."""
    rows = 0
    for piece in pieces:
        if tuple(piece.shape[1:]) != spec.shape[1:]:
            return -1
        rows += len(piece)
        for block in piece.split(max(_BLOCK // (math.prod(spec.shape[1:]) * 4), 1)):
            file.write(block.to(spec.dtype).contiguous().view(torch.uint8).numpy().data)
    return rows


def write_folder(folder: Path, specs: Mapping[str, TensorSpec], tensors: Stream, max_shard_bytes: int | None) -> None:
    """Write model.safetensors, or several files of at most `max_shard_bytes` of tensors with their index.

    A tensor larger than that has a file of its own.
    """
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for key, spec in specs.items():
        if shards[-1] and max_shard_bytes is not None and size + spec.bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = spec
        size += spec.bytes
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS_FILE, specs, tensors)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, tensors)
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(spec.bytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB or 500MB (decimal units).

    Raises:
        CheckpointError: if it is no such size.
    """
    match = re.fullmatch(r"(\d+)\s*(B|KB|MB|GB)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise CheckpointError(f"--max-shard-size '{text}': must be a number and B, KB, MB or GB; write for example 5GB")
    return int(match[1]) * 1000 ** ("B", "KB", "MB", "GB").index(match[2])
