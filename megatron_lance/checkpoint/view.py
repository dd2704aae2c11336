"""A checkpoint seen as a folder in the public layout (spec/model.md section 9).

Station: checkpoint -> [view] -> export, verification.  Public tensors are made one parameter at a time; the latent
position table, which no checkpoint holds, is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from tqdm import tqdm

from megatron_lance.checkpoint.hf_lance import POSITION_KEY, VIT_PREFIX, bindings, public_shapes
from megatron_lance.checkpoint.manifest import Checkpoint, check_digests, checkpoint_at, names_checkpoint
from megatron_lance.checkpoint.public_files import Shape, Stream, TensorFolder, TensorSpec
from megatron_lance.checkpoint.tensors import EMA_PREFIX, ModelTensors
from megatron_lance.config.loader import from_dict
from megatron_lance.config.schema import ModelConfig, RunConfig
from megatron_lance.model.embedder import LatentPosition

VIT_FOLDER = "vit"
"""Where an imported checkpoint keeps the frozen ViT, in the layout of encoders.vit_path."""


class PublicTensors(Protocol):
    """Tensors by public name."""

    specs: dict[str, TensorSpec]

    def get(self, key: str) -> torch.Tensor:
        """The tensor of this name."""
        ...


class CheckpointView:
    """The public tensors of a checkpoint written on any layout.

    Args:
        checkpoint: of a Lance model.
        frames: of the position table; None: as many as the checkpoint's model has.
        vit: folder of a bare ViT's weights; None: what the checkpoint holds, if any.
        ema: take the averaged weights.

    Attributes:
        specs: of every public tensor, in the order of `stream`.

    Raises:
        StoreError: if the checkpoint holds no Lance model, or no averaged weights.
    """

    def __init__(
        self, checkpoint: Checkpoint, frames: int | None = None, vit: Path | None = None, ema: bool = False
    ) -> None:
        self.run: RunConfig = from_dict(checkpoint.manifest.config, f"checkpoint '{checkpoint.folder}'")
        self.model: ModelConfig = self.run.model
        self.tensors = ModelTensors(checkpoint.folder, EMA_PREFIX if ema else "", self.run.training.freeze)
        self.frames = frames or self.model.latent_position_frames
        own_vit = checkpoint.folder / VIT_FOLDER
        folder = vit or (own_vit if own_vit.is_dir() else None)
        self.vit = None if folder is None else TensorFolder(folder)
        self.specs = {key: TensorSpec(shape, self.tensors.dtype) for key, shape in self._shapes().items()}
        if self.vit is not None:
            self.specs |= {VIT_PREFIX + key: spec for key, spec in self.vit.specs.items()}
        self._bindings = bindings(self.model)
        self._owner = {key: name for name, binding in self._bindings.items() for key in binding.keys}
        self._held: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def _shapes(self) -> dict[str, Shape]:
        table = self.frames * self.model.latent_position_size**2, self.model.hidden_size
        return {**public_shapes(self.model), POSITION_KEY: table}

    def get(self, key: str) -> torch.Tensor:
        """The tensor of a public name in its spec's dtype."""
        if key == POSITION_KEY:
            return torch.cat([part.to(self.tensors.dtype) for part in position_table(self.model, self.frames)])
        if self.vit is not None and key.startswith(VIT_PREFIX):
            return self.vit.get(key.removeprefix(VIT_PREFIX))
        name = self._owner[key]
        if self._held[0] != name:
            self._held = "", {}  # let go of one parameter before the next is read
            self._held = name, self._public(name)
        return self._held[1][key]

    def _public(self, name: str) -> dict[str, torch.Tensor]:
        """The public tensors of a parameter."""
        binding = self._bindings[name]
        return dict(zip(binding.keys, binding.split(self.tensors.get(name)), strict=True))

    def stream(self) -> Stream:
        """Every tensor in the order of `specs`.

        In memory is no more than a parameter, a chunk of it as stored and, of query, key and value, a copy.  What is
        one public tensor, as the largest are, the embeddings and the LM head, is in memory once, in all its pieces.
        """
        for name, binding in self._bindings.items():
            if len(binding.keys) == 1:
                yield binding.keys[0], self.tensors.pieces(name)
            else:
                yield from ((key, [part]) for key, part in self._public(name).items())
        yield POSITION_KEY, position_table(self.model, self.frames)
        for key in self.vit.specs if self.vit is not None else ():
            yield VIT_PREFIX + key, self._vit_pieces(key)

    def _vit_pieces(self, key: str) -> Iterable[torch.Tensor]:
        assert self.vit is not None
        return [self.vit.get(key)]


def position_table(model: ModelConfig, frames: int) -> Iterator[torch.Tensor]:
    """The frozen latent position table, float32, frame by frame: [size * size, hidden] each."""
    size = model.latent_position_size
    rows = LatentPosition(frames, size, model.hidden_size)
    plane = torch.cartesian_prod(torch.arange(size), torch.arange(size))
    for frame in range(frames):
        yield rows(torch.cat([torch.full((size * size, 1), frame), plane], dim=1))


def sound_at(path: Path, progress: bool = False) -> Checkpoint:
    """The checkpoint in a folder, or the latest of a run's folder, its files held against their digests.

    Args:
        path: of the folder.
        progress: draw a progress bar on stderr.

    Raises:
        StoreError: if there is none, or it is incomplete or damaged.
    """
    checkpoint = checkpoint_at(path)
    size = sum(checkpoint.manifest.files.values())
    with tqdm(desc="check", unit="B", unit_scale=True, total=size, disable=not progress) as bar:
        check_digests(checkpoint, bar.update)
    return checkpoint


def open_public(path: Path, progress: bool = False) -> PublicTensors:
    """A folder in the public layout, a checkpoint, or the folder of a run.

    Args:
        path: of the folder.
        progress: draw a progress bar on stderr while a checkpoint's files are held against their digests.

    Raises:
        UserError: if it is none of them, or a checkpoint that is damaged.
    """
    return CheckpointView(sound_at(path, progress)) if names_checkpoint(path) else TensorFolder(path)


def differences(a: PublicTensors, b: PublicTensors, keys: Iterable[str]) -> Iterator[str]:
    """Everything in which two sets of tensors differ: names, shapes, dtypes, values bit for bit.

    Args:
        a: one.
        b: the other.
        keys: what `all_keys` lists; the caller may watch its progress.
    """
    for key in keys:
        if key not in a.specs or key not in b.specs:
            yield f"{key}: only in the {'second' if key not in a.specs else 'first'}"
            continue
        left, right = a.specs[key], b.specs[key]
        if left.shape != right.shape:
            yield f"{key}: shape {left.shape} and {right.shape}"
            continue
        if left.dtype != right.dtype:
            yield f"{key}: {left.dtype} and {right.dtype}".replace("torch.", "")
        one, two = a.get(key), b.get(key)
        same = _bits(one, two) if left.dtype == right.dtype else torch.equal(one.float(), two.float())
        if not same:
            distance = (one.float() - two.float()).abs().nan_to_num(torch.inf, torch.inf).max()
            yield f"{key}: values differ by up to {float(distance):.3g}"


def all_keys(a: PublicTensors, b: PublicTensors) -> list[str]:
    """Names of either, in the first's order."""
    return list(dict.fromkeys([*a.specs, *b.specs]))


def _bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
