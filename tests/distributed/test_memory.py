"""The memory formulas against what every rank of many layouts holds, and its peak in a real step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig
from megatron_lance.config.validate import validate
from megatron_lance.packing.layout import rows_per_rank
from megatron_lance.profiling.memory import PackLoad, memory_per_rank, passes_in_flight
from tests.distributed.launch import on_ranks
from tests.shared import REPOSITORY

TP, PP, CP = (f"parallel.{name}_parallel_size" for name in ("tensor_model", "pipeline_model", "context"))
VPP = "parallel.virtual_pipeline_model_parallel_size"
FIRST, LAST = (f"parallel.num_layers_in_{end}_pipeline_stage" for end in ("first", "last"))
BF16, FULL = "training.precision=bf16", "parallel.recompute_granularity=full"
SELECTIVE = "parallel.recompute_granularity=selective"
MODULES = "parallel.recompute_modules=[core_attn,layernorm,mlp]"
OF_GEN = [SELECTIVE, "parallel.recompute_modules=[mlp]", "parallel.recompute_experts=[gen]"]
OFFLOAD = "parallel.offload_layers"
LAYOUTS = [
    [f"{TP}=2", "model.ce_chunk_rows=16"],
    [f"{TP}=4", BF16],  # more ranks than key/value heads
    [f"{TP}=4", "model.num_query_groups=1", FULL],
    [f"{CP}=4", BF16],
    [f"{CP}=2", SELECTIVE, MODULES],
    [f"{PP}=2", f"{CP}=2", BF16, FULL],
    [f"{PP}=4", "model.num_layers=8"],
    [f"{TP}=2", f"{PP}=2", BF16],
    [f"{TP}=2", f"{PP}=2", f"{VPP}=2"],
    [f"{PP}=2", f"{FIRST}=1", "parallel.use_distributed_optimizer=false"],
    [f"{PP}=4", f"{FIRST}=1", f"{LAST}=1", "model.num_layers=6", SELECTIVE, "parallel.recompute_modules=[mlp]"],
    [BF16, "model.ce_chunk_rows=16"],
    [f"{CP}=2", BF16, "model.attention_backend=varlen_emulated"],
    [f"{PP}=2", f"{OFFLOAD}=3", "model.num_layers=8"],
    [f"{PP}=2", f"{VPP}=2", f"{OFFLOAD}=1", "model.num_layers=12", SELECTIVE, "parallel.recompute_modules=[core_attn]"],
    [f"{PP}=2", f"{VPP}=2", f"{OFFLOAD}=1", "model.num_layers=12", SELECTIVE, MODULES],
    [f"{TP}=2", f"{PP}=2", f"{VPP}=2", "model.num_layers=8", FULL],
    [f"{TP}=2", f"{CP}=2", f"{OFFLOAD}=2", "model.num_layers=8", SELECTIVE, MODULES],
    [f"{OFFLOAD}=3", *OF_GEN],
]
COMMON = ["data.seq_length=2304", "model.hidden_size=128", "model.ffn_hidden_size=344", "training.global_batch_size=4"]


def sent_bytes(run: RunConfig, pp_rank: int) -> int:
    """What chunks have sent and CPU runs keep until its backward: gloo may still read it."""
    parallel = run.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp, rows = parallel.pipeline_model_parallel_size, rows_per_rank(run.data.seq_length, cp, tp, row_alignment(run))
    passes = passes_in_flight(parallel, pp_rank, run.training.global_batch_size * tp * cp * pp // 4)
    passes -= pp_rank == pp - 1  # the last chunk sends nothing
    return passes * rows // tp * run.model.hidden_size * (4 if run.training.precision == "float32" else 2)


@pytest.mark.distributed
def test_formulas_are_what_every_rank_holds(tmp_path: Path) -> None:
    """Parameters and weights exactly; buckets of gradients and optimizer shards within their padding; peaks in 10%."""
    config = REPOSITORY / "examples" / "configs" / "tiny.yaml"
    out = tmp_path / "counts.json"
    script = REPOSITORY / "tests" / "distributed" / "run_memory.py"
    layouts = [[*COMMON, *layout] for layout in LAYOUTS]
    on_ranks(4, str(script), str(out), str(config), *(" ".join(layout) for layout in layouts))
    errors = {}
    for layout, found in zip(layouts, json.loads(out.read_text(encoding="utf-8")), strict=True):
        run = load_config([str(config)], layout)
        validate(run, 4)
        assert len(found) == 4
        for rank in found:
            expected = memory_per_rank(run, 4, PackLoad(**rank["load"]))[rank["pp_rank"]]
            assert rank["parameters"] == expected.parameters and rank["weight_bytes"] == expected.weight_bytes, layout
            assert rank["gradient_bytes"] == pytest.approx(expected.gradient_bytes, rel=0.01), layout
            assert rank["optimizer_bytes"] == pytest.approx(expected.optimizer_bytes, rel=0.03), layout
            name = f"{' '.join(layout[len(COMMON) :])} pp rank {rank['pp_rank']}"
            errors[name] = round((expected.activation_bytes + sent_bytes(run, rank["pp_rank"])) / rank["peak"] - 1, 3)
            if run.parallel.offload_layers:
                errors[f"{name}, host"] = round(expected.host_bytes / rank["host"] - 1, 3)
    assert {name: error for name, error in errors.items() if abs(error) > 0.1} == {}
