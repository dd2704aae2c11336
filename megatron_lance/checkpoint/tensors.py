"""A checkpoint's model tensors, one at a time, without a process group.

Station: checkpoint -> [tensors] -> export; import -> [tensors] -> checkpoint.  Sharded tensors are whole in the
checkpoint's index, whatever layout wrote them; only the pieces that make up a tensor are read, and what is written is
asked for tensor by tensor.  megatron-core keeps the layers' parameters stacked, [layers, ...], under one key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
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

EMA_PREFIX = "ema."
"""Of the keys of averaged weights."""


def _stacked(name: str) -> tuple[str, int | None]:
    """(key, layer) under which megatron-core keeps a parameter; the layer is None outside the decoder."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return name, None
    return ".".join(parts[:2] + parts[3:]), int(parts[2])


class ModelTensors:
    """Parameters by global name, whole, as they are with tp 1.

    Args:
        folder: of a complete checkpoint.
        prefix: of the keys: EMA_PREFIX for averaged weights.

    Attributes:
        dtype: of the word embeddings.

    Raises:
        StoreError: if it holds no Lance model, or no averaged weights.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        metadata = FileSystemReader(folder).read_metadata()
        self.known, self.files = metadata.state_dict_metadata, metadata.storage_data
        self.dtype: torch.dtype = self._stored(f"{prefix}embedder.word_embeddings.weight").properties.dtype

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
        """The parameter of this name in the checkpoint's dtype; read by pieces, the whole is held once.

        Raises:
            StoreError: if it is not there or not all of it.
        """
        pieces = list(self.pieces(name))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The parameter in pieces along its first dimension, as few as it was written in.

        Raises:
            StoreError: if it is not there or not all of it.
        """
        key, layer = _stacked(name)
        key = self.prefix + key
        stored = self._stored(key)
        inside = [c for c in stored.chunks if layer is None or c.offsets[0] <= layer < c.offsets[0] + c.sizes[0]]
        shape = tuple(stored.size) if layer is None else tuple(stored.size)[1:]
        if sum(math.prod(c.sizes) // (1 if layer is None else c.sizes[0]) for c in inside) != math.prod(shape):
            raise StoreError(f"checkpoint '{self.folder}': holds only parts of {key}; use another checkpoint")
        if self.prefix and len(inside) > 1:
            yield self._from_boxes(key, layer, shape, inside)
            return
        rows: dict[int, list[tuple[Sequence[int], ChunkStorageMetadata]]] = {}
        for chunk in inside:
            offsets = chunk.offsets if layer is None else chunk.offsets[1:]
            rows.setdefault(offsets[0], []).append((offsets, chunk))
        for start in sorted(rows):
            yield self._band(key, layer, shape, sorted(rows[start], key=lambda pair: list(pair[0])))

    def _from_boxes(
        self, key: str, layer: int | None, shape: Shape, chunks: Sequence[ChunkStorageMetadata]
    ) -> torch.Tensor:
        """A tensor from chunks that need not form a grid."""
        whole = torch.empty(shape, dtype=self._stored(key).properties.dtype)
        for chunk in chunks:
            part = self._chunk(key, layer, chunk)
            offsets = chunk.offsets if layer is None else chunk.offsets[1:]
            whole[tuple(slice(at, at + size) for at, size in zip(offsets, part.shape, strict=True))] = part
        return whole

    def _band(
        self, key: str, layer: int | None, shape: Shape, chunks: Sequence[tuple[Sequence[int], ChunkStorageMetadata]]
    ) -> torch.Tensor:
        """Chunks that begin at the same row, side by side."""
        if len(chunks) == 1:
            return self._chunk(key, layer, chunks[0][1])
        first = self._chunk(key, layer, chunks[0][1])
        band = torch.empty(first.shape[0], *shape[1:], dtype=first.dtype)
        for offsets, chunk in chunks:
            part = self._chunk(key, layer, chunk)
            area = tuple(slice(at, at + size) for at, size in zip(offsets[1:], part.shape[1:], strict=True))
            band[(slice(None), *area)] = part
        return band

    def _chunk(self, key: str, layer: int | None, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """A stored chunk, or of a stacked one the layer."""
        at = self.files[MetadataIndex(key, chunk.offsets)]
        with (self.folder / at.relative_path).open("rb") as file:
            part = cast(IO[bytes], _create_file_view(file, at.offset, at.length))
            tensor: torch.Tensor = torch.load(part, map_location="cpu", weights_only=True)
        return tensor if layer is None else tensor[layer - chunk.offsets[0]]


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


def write_model(
    folder: Path, specs: Mapping[str, TensorSpec], layers: int, read: Callable[[str], torch.Tensor]
) -> None:
    """Write a model as megatron-core's dist_checkpointing does, one tensor after another, without a process group.

    Args:
        folder: to write into.
        specs: of every parameter as it is with tp 1, by global name.
        layers: of the whole model.
        read: the parameter of a name, in its spec's shape and dtype.
    """
    items = {name: _item(name, spec, layers) for name, spec in specs.items()}
    names = {(item.index.fqn, item.index.offset): name for name, item in items.items()}

    def make(index: MetadataIndex) -> torch.Tensor:
        name = names[index.fqn, index.offset]
        tensor = read(name)
        chunk = items[name].tensor_data
        assert chunk is not None
        return tensor.contiguous().view(chunk.chunk.sizes)

    save({}, storage_writer=FileSystemWriter(folder), planner=_Streamed(list(items.values()), make), no_dist=True)
    torch.save({}, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist"), str(folder))
