"""The whole tensors of a checkpoint, whatever layout wrote them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load


def stored_tensors(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors whose keys begin so, by key."""
    known = FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in known.items()
        if key.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }
    load(wanted, checkpoint_id=folder, no_dist=True)
    return wanted


def assert_equal_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same keys, dtypes and bits."""
    assert found and found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
