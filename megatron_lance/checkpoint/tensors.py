"""A checkpoint's model tensors, one at a time, without a process group.

Station: checkpoint -> [tensors] -> export; import -> [tensors] -> checkpoint.  Sharded tensors are whole in the
checkpoint's index, whatever layout wrote them; only the pieces that make up a tensor are read, and what is written is
asked for tensor by tensor.  megatron-core keeps the layers' parameters stacked, [layers, ...], under one key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_lance.checkpoint.manifest import StoreError
from megatron_lance.checkpoint.public_files import Shape, TensorSpec
from megatron_lance.model.freeze import is_frozen

EMA_PREFIX = "ema."
"""Of the keys of averaged weights."""


def _stacked(name: str) -> tuple[str, int | None]:
    """(key, layer) under which megatron-core keeps a parameter; the layer is None outside the decoder."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return name, None
    return ".".join(parts[:2] + parts[3:]), int(parts[2])


@dataclass(frozen=True)
class _Box:
    """Where a stored chunk lies in a parameter.

    Attributes:
        chunk: with its place in the stack of layers.
        offsets: in the parameter.
        layer: of a stacked one.
    """

    chunk: ChunkStorageMetadata
    offsets: Shape
    layer: int | None

    @property
    def sizes(self) -> Shape:
        """In the parameter."""
        return tuple(self.chunk.sizes if self.layer is None else self.chunk.sizes[1:])

    @property
    def top(self) -> int:
        """First row."""
        return self.offsets[0]

    @property
    def bottom(self) -> int:
        """Row behind the last."""
        return self.offsets[0] + self.sizes[0]


class ModelTensors:
    """Parameters by global name, whole, as they are with tp 1.

    Args:
        folder: of a complete checkpoint.
        prefix: of the keys: EMA_PREFIX for averaged weights.
        freeze: sets of the run that wrote it; frozen weights have no average and are their own.

    Attributes:
        dtype: of the trained weights.

    Raises:
        StoreError: if it holds no Lance model, or no averaged weights.
    """

    def __init__(self, folder: Path, prefix: str = "", freeze: Sequence[str] = ()) -> None:
        self.folder, self.prefix, self.freeze = folder, prefix, freeze
        metadata = FileSystemReader(folder).read_metadata()
        self.known, self.files = metadata.state_dict_metadata, metadata.storage_data
        self.dtype: torch.dtype = self._stored(f"{prefix}heads.llm2vae.weight").properties.dtype

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self.known.get(key)
        if not isinstance(stored, TensorStorageMetadata) and self.prefix:
            raise StoreError(
                f"checkpoint '{self.folder}': has no averaged weights; take its own, or train with training.ema_decay"
            )
        if not isinstance(stored, TensorStorageMetadata):
            raise StoreError(f"checkpoint '{self.folder}': has no tensor {key}; use a checkpoint of a Lance model")
        return stored

    def get(self, name: str) -> torch.Tensor:
        """The parameter of this name in the checkpoint's dtype; read by pieces into memory that is taken once.

        Raises:
            StoreError: if it is not there or not all of it.
        """
        shape, pieces = self._shape(name), self.pieces(name)
        first = next(pieces)
        if len(first) == shape[0]:
            return first
        whole = torch.empty(shape, dtype=first.dtype)
        whole[: len(first)] = first
        end = len(first)
        del first
        for piece in pieces:
            whole[end : end + len(piece)] = piece
            end += len(piece)
        return whole

    def _shape(self, name: str) -> Shape:
        """Of a parameter; a frozen one is its own average."""
        key, layer = _stacked(name)
        prefix = "" if is_frozen(name, self.freeze) else self.prefix
        size = self._stored(prefix + key).size
        return tuple(size if layer is None else size[1:])

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The parameter in pieces along its first dimension, in order; each is read when it is asked for.

        A piece is a stored chunk of whole rows, or several that share rows, put together.

        Raises:
            StoreError: if it is not there or not all of it.
        """
        if self.prefix and is_frozen(name, self.freeze):
            yield from (piece.to(self.dtype) for piece in ModelTensors(self.folder).pieces(name))
            return
        key, layer = _stacked(name)
        key = self.prefix + key
        stored, shape = self._stored(key), self._shape(name)
        inside = [c for c in stored.chunks if layer is None or c.offsets[0] <= layer < c.offsets[0] + c.sizes[0]]
        boxes = [_Box(c, (*c.offsets,) if layer is None else (*c.offsets[1:],), layer) for c in inside]
        if sum(math.prod(box.sizes) for box in boxes) != math.prod(shape):
            raise StoreError(f"checkpoint '{self.folder}': holds only parts of {key}; use another checkpoint")
        held: dict[Shape, torch.Tensor] = {}
        for top, bottom in pairwise(sorted({row for box in boxes for row in (box.top, box.bottom)})):
            yield self._band(
                key, shape, [box for box in boxes if box.top < bottom and box.bottom > top], top, bottom, held
            )

    def _band(
        self, key: str, shape: Shape, boxes: Sequence[_Box], top: int, bottom: int, held: dict[Shape, torch.Tensor]
    ) -> torch.Tensor:
        """Rows from `top` to `bottom`, which `boxes` make up; chunks that go on below stay in `held`, by offsets."""
        band = None
        for box in boxes:
            whole = held.pop(box.offsets) if box.offsets in held else self._chunk(key, box)
            if box.bottom > bottom:
                held[box.offsets] = whole
            part = whole[top - box.top : bottom - box.top]
            if box.sizes[1:] == shape[1:]:
                return part
            if band is None:
                band = torch.empty(bottom - top, *shape[1:], dtype=part.dtype)
            area = tuple(slice(at, at + size) for at, size in zip(box.offsets[1:], box.sizes[1:], strict=True))
            band[(slice(None), *area)] = part
        assert band is not None
        return band

    def _chunk(self, key: str, box: _Box) -> torch.Tensor:
        """A stored chunk, or of a stacked one the layer."""
        at = self.files[MetadataIndex(key, box.chunk.offsets)]
        with (self.folder / at.relative_path).open("rb") as file:
            part = cast(IO[bytes], _create_file_view(file, at.offset, at.length))
            tensor: torch.Tensor = torch.load(part, map_location="cpu", weights_only=True)
        return tensor if box.layer is None else tensor[box.layer - box.chunk.offsets[0]]


class _Streamed(SavePlanner):
    """Writes tensors that are made only when their turn has come."""

    def __init__(self, items: Sequence[WriteItem], make: Callable[[MetadataIndex], torch.Tensor]) -> None:
        self.items, self.make = items, make

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the items are known."""

    def create_local_plan(self) -> SavePlan:
        """All items."""
        return SavePlan(list(self.items))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The one plan there is, and the index of what it writes."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """The tensor of an item."""
        return self.make(write_item.index)


def _item(name: str, spec: TensorSpec, layers: int) -> WriteItem:
    key, layer = _stacked(name)
    stack, at = ((), ()) if layer is None else ((layers,), (layer,))
    offsets = torch.Size([*at, *[0] * len(spec.shape)])
    chunk = ChunkStorageMetadata(offsets, torch.Size([*[1] * len(at), *spec.shape]))
    size = torch.Size([*stack, *spec.shape])
    data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=spec.dtype), size=size)
    return WriteItem(index=MetadataIndex(key, offsets), type=WriteItemType.SHARD, tensor_data=data)


def _cause(error: CheckpointException) -> BaseException:
    """What the one rank there is has raised; torch's writer may hide an OSError behind an error of its own."""
    ((raised, _),) = error.failures.values()
    link: BaseException | None = raised
    while link is not None and not isinstance(link, OSError):
        link = link.__context__
    return link or raised


def write_model(
    folder: Path, specs: Mapping[str, TensorSpec], layers: int, read: Callable[[str], torch.Tensor]
) -> None:
    """Write a model as megatron-core's dist_checkpointing does, one tensor after another, without a process group.

    Args:
        folder: to write into.
        specs: of every parameter as it is with tp 1, by global name.
        layers: of the whole model.
        read: the parameter of a name, in its spec's shape and dtype.

    Raises:
        OSError: if the disk does not take it; and whatever `read` raises.
    """
    items = {name: _item(name, spec, layers) for name, spec in specs.items()}
    names = {(item.index.fqn, item.index.offset): name for name, item in items.items()}

    def make(index: MetadataIndex) -> torch.Tensor:
        name = names[index.fqn, index.offset]
        tensor = read(name)
        chunk = items[name].tensor_data
        assert chunk is not None
        return tensor.contiguous().view(chunk.chunk.sizes)

    try:
        save({}, storage_writer=FileSystemWriter(folder), planner=_Streamed(list(items.values()), make), no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from error
    with (folder / COMMON_STATE_FNAME).open("wb") as file:
        torch.save({}, file)
    save_config(CheckpointingConfig("torch_dist"), str(folder))
