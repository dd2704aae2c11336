"""Parameters per rank, as estimated, against models built on four ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lance.config.loader import load_config
from megatron_lance.config.validate import validate
from megatron_lance.profiling.memory import memory_per_rank
from tests.distributed.launch import torchrun
from tests.shared import REPOSITORY

TP, PP, CP = (f"parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
VPP = "parallel.virtual_pipeline_model_parallel_size"
FIRST, LAST = (f"parallel.num_layers_in_{end}_pipeline_stage" for end in ("first", "last"))
LAYOUTS = [
    [f"{TP}=2"],
    [f"{TP}=4"],  # more ranks than key/value heads
    [f"{TP}=4", "model.num_query_groups=1"],
    [f"{PP}=2", f"{CP}=2"],
    [f"{PP}=4", "model.num_layers=8"],
    [f"{TP}=2", f"{PP}=2"],
    [f"{TP}=2", f"{PP}=2", f"{VPP}=2"],
    [f"{PP}=2", f"{FIRST}=1"],
    [f"{PP}=4", f"{FIRST}=1", f"{LAST}=1", "model.num_layers=6"],
]


@pytest.mark.distributed
def test_estimated_parameters_are_those_of_every_rank(tmp_path: Path) -> None:
    config = REPOSITORY / "examples" / "configs" / "tiny.yaml"
    out = tmp_path / "counts.json"
    script = REPOSITORY / "tests" / "distributed" / "run_memory.py"
    torchrun(4, str(script), str(out), str(config), *(" ".join(layout) for layout in LAYOUTS))
    for layout, found in zip(LAYOUTS, json.loads(out.read_text(encoding="utf-8")), strict=True):
        run = load_config([str(config)], layout)
        validate(run, 4)
        expected = {memory.pp_rank: memory.parameters for memory in memory_per_rank(run, 4)}
        assert len(found) == 4
        assert [(pp_rank, expected[pp_rank]) for pp_rank, _ in found] == [tuple(pair) for pair in found], layout
