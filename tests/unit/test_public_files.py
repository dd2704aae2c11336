"""Folders of safetensors files: header-first writing, shards and index, one error for everything wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lance.checkpoint.public_files import (
    INDEX_FILE,
    CheckpointError,
    Stream,
    TensorFolder,
    TensorSpec,
    parse_size,
    write_folder,
    write_safetensors,
)

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(4, 3),
    "b": torch.tensor([1.5, float("nan"), -0.0]).bfloat16(),
    "c": torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0)),
    "d": torch.arange(6).view(2, 3),
}
SPECS = {key: TensorSpec(tuple(tensor.shape), tensor.dtype) for key, tensor in TENSORS.items()}


def stream(piece_rows: int = 100) -> Stream:
    for key, tensor in TENSORS.items():
        yield key, iter(tensor.split(piece_rows))


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(
        one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("piece_rows", [1, 3, 100])
def test_what_is_written_is_what_the_library_reads(tmp_path: Path, piece_rows: int) -> None:
    write_safetensors(tmp_path / "x.safetensors", SPECS, stream(piece_rows))
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys() and all(same(found[key], TENSORS[key]) for key in TENSORS)
    folder = TensorFolder(tmp_path)
    assert folder.specs == SPECS and all(same(folder.get(key), TENSORS[key]) for key in TENSORS)


def test_tensors_take_the_dtype_of_their_place(tmp_path: Path) -> None:
    specs = {key: TensorSpec(spec.shape, torch.bfloat16) for key, spec in SPECS.items()}
    write_safetensors(tmp_path / "x.safetensors", specs, stream())
    found = load_file(tmp_path / "x.safetensors")
    assert all(same(found[key], TENSORS[key].bfloat16()) for key in TENSORS)


def test_a_tensor_out_of_place_is_refused(tmp_path: Path) -> None:
    spec = TensorSpec((3, 2), torch.float32)
    for name, pieces in (("b", [torch.zeros(3, 2)]), ("a", [torch.zeros(2, 2)]), ("a", [torch.zeros(3, 1)])):
        with pytest.raises(CheckpointError, match=rf"{name} of -?\d+ rows came in place of a \(3, 2\)"):
            write_safetensors(tmp_path / "x.safetensors", {"a": spec}, iter([(name, pieces)]))


def test_shards_are_as_large_as_allowed_and_indexed(tmp_path: Path) -> None:
    write_folder(tmp_path, SPECS, stream(), 60)  # 48, 6, 80 and 48 bytes
    files = {path.name: set(load_file(path)) for path in sorted(tmp_path.glob("*.safetensors"))}
    assert files == {
        "model-00001-of-00003.safetensors": {"a", "b"},
        "model-00002-of-00003.safetensors": {"c"},
        "model-00003-of-00003.safetensors": {"d"},
    }
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 182
    assert index["weight_map"] == {key: name for name, keys in files.items() for key in sorted(keys)}
    folder = TensorFolder(tmp_path)
    assert all(same(folder.get(key), TENSORS[key]) for key in TENSORS)
    save_file({"a": torch.zeros(1)}, tmp_path / "ema.safetensors")  # not in the index, so not of the model
    assert TensorFolder(tmp_path).specs == SPECS


def test_everything_wrong_with_a_folder_is_one_error(tmp_path: Path) -> None:
    write_folder(tmp_path, SPECS, stream(), 60)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00003-of-00003.safetensors")
    with pytest.raises(CheckpointError) as caught:
        TensorFolder(tmp_path)
    for part in (
        "model-00002-of-00003.safetensors: named by model.safetensors.index.json, but missing",
        "a: in model-00001-of-00003.safetensors and in model-00003-of-00003.safetensors",
        "d: not in model-00003-of-00003.safetensors",
    ):
        assert part in str(caught.value)
    (tmp_path / INDEX_FILE).write_text("[1]")
    with pytest.raises(CheckpointError, match="is not a readable index"):
        TensorFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"--weights 'x': no \*.safetensors file there"):
        TensorFolder(tmp_path / "nowhere", "--weights 'x'")
    save_file({"e": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "complex.safetensors")
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match="complex.safetensors: has types this program does not read: e: C64"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("10kb", 10**4), ("7B", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "0GB", "-1GB", "5GiB", "big"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(CheckpointError, match="--max-shard-size .*: must be a number and B, KB, MB or GB"):
        parse_size(text)
