"""Public folder -> checkpoint -> several layouts -> public folder, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lance.checkpoint.hf_export import export_lance
from megatron_lance.checkpoint.hf_import import import_lance
from megatron_lance.checkpoint.manifest import check_digests, open_checkpoint
from megatron_lance.checkpoint.view import all_keys, differences, open_public
from tests.distributed.launch import on_ranks
from tests.shared import REPOSITORY
from tests.unit.test_conversion import MODEL, differing, release, write_release

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "one": "",
    "tp2": "tensor_model:2",
    "pp2": "pipeline_model:2",
    "tp2_pp2": "tensor_model:2,pipeline_model:2",
    "tp4": "tensor_model:4",
}
RANKS = {"one": 1, "tp2": 2, "pp2": 2, "tp2_pp2": 4, "tp4": 4}
"""Ranks that write something: data-parallel copies do not."""
EVEN = replace(MODEL, num_layers=4)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in`, the checkpoint made of it, and below `layouts` what four ranks made of that on each layout."""
    folder = tmp_path_factory.mktemp("conversion")
    write_release(folder / "in", release(torch.bfloat16, EVEN, vit=False), EVEN)
    import_lance(folder / "in", folder / "checkpoint")
    script = str(REPOSITORY / "tests" / "distributed" / "run_conversion.py")
    layouts = [f"{name}={degrees}" for name, degrees in LAYOUTS.items()]
    on_ranks(4, script, str(folder / "checkpoint"), str(folder / "layouts"), *layouts)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_through_a_layout(converted: Path, layout: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(converted / "layouts" / layout)
    check_digests(checkpoint)
    assert len({name.split("_")[2] for name in checkpoint.manifest.files if name.startswith("__")}) == RANKS[layout]
    export_lance(checkpoint, tmp_path / "out", tokenizer=converted / "in", max_shard_bytes=100_000)
    source = open_public(converted / "in")
    assert differing(tmp_path / "out", {key: source.get(key) for key in source.specs}) == []
    other = open_public(converted / "layouts" / layout)
    assert list(differences(source, other, all_keys(source, other))) == []
