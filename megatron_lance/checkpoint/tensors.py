"""A checkpoint's model tensors, one at a time, without a process group.

Station: checkpoint -> [tensors] -> export.  Sharded tensors are whole in the checkpoint's index, whatever layout wrote
them; only the pieces that make up a tensor are read.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_lance.checkpoint.manifest import StoreError


class _Into(DefaultLoadPlanner):
    """Loads every piece into one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.tensor


class ModelTensors:
    """Parameters by global name, whole.

    megatron-core keeps the layers' parameters stacked, [layers, ...], under one key.

    Args:
        folder: of a complete checkpoint.

    Attributes:
        dtype: of the word embeddings.

    Raises:
        StoreError: if it holds no Lance model.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reader = FileSystemReader(folder)
        metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.known = metadata.state_dict_metadata
        self.dtype: torch.dtype = self._stored("embedder.word_embeddings.weight").properties.dtype

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self.known.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise StoreError(f"checkpoint '{self.folder}': has no tensor {key}; use a checkpoint of a Lance model")
        return stored

    def get(self, name: str) -> torch.Tensor:
        """The parameter of this name as it is with tp 1, in the checkpoint's dtype.

        Raises:
            StoreError: if it is not there or not all of it.
        """
        parts = name.split(".")
        if parts[:2] != ["decoder", "layers"]:
            shape = tuple(self._stored(name).size)
            return self._region(name, (0,) * len(shape), shape)
        key = ".".join(parts[:2] + parts[3:])
        _, *shape_of_one = self._stored(key).size
        return self._region(key, (int(parts[2]), *[0] * len(shape_of_one)), (1, *shape_of_one))[0]

    def _region(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        stored = self._stored(key)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        tensor = torch.empty(sizes, dtype=stored.properties.dtype)
        if sum(math.prod(item.lengths) for item in items) != tensor.numel():
            raise StoreError(f"checkpoint '{self.folder}': holds only parts of {key}; use another checkpoint")
        self.reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        return tensor
