"""Count what the collectives of one layer move on several layouts of four ranks, and print it beside the formulas."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_lance.config.schema import ParallelConfig
from megatron_lance.model.lance_model import build_stages
from megatron_lance.model.transformer_config import DTYPES, transformer_config
from megatron_lance.packing.layout import Layout
from megatron_lance.packing.positions import Mape
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.dispatch import rank_batch
from megatron_lance.parity.equivalence import MODEL, TOKENIZER_SIZE, global_batches
from megatron_lance.profiling.communication import (
    CollectiveCounter,
    gathered_keys_values,
    qkv_over_tp,
    sequence_parallel,
)

LAYOUTS = {"cp4": (1, 4, None), "tp2-cp2": (2, 2, None), "tp4": (4, 1, None), "cp4-recompute": (1, 4, "selective")}
PRECISIONS = {"float32": 4, "bf16": 2}


def count(tp: int, cp: int, recompute: str | None, precision: str) -> dict[str, dict[str, float]]:
    """Counted and computed bytes of the layers' forward and backward, by kind of group.

    Under "early" what had been sent for keys and values when the first layer's gen expert began to project.
    """
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        region_alignment=4,
        recompute_granularity=recompute,
        recompute_modules=("core_attn",),
    )
    groups = parallel_groups.initialize(parallel, seed=1)
    filled = global_batches()["all tasks"][0]
    layout = Layout.build(filled.pack, cp, tp, 4)
    batch = rank_batch(
        filled.pack,
        layout,
        filled.tokens,
        filled.visuals,
        filled.noise,
        mape=Mape.RELEASE,
        mape_step=1000,
        cp_rank=groups.cp_rank,
        tp_rank=groups.tp_rank,
    ).to(groups.device, DTYPES[precision])
    (stage,) = build_stages(transformer_config(MODEL, parallel, precision), MODEL, TOKENIZER_SIZE)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    hidden = torch.randn(layout.rows // tp, 1, MODEL.hidden_size, dtype=DTYPES[precision], requires_grad=True)
    counter, early = CollectiveCounter(), list[int]()
    cp_group = parallel_state.get_context_parallel_group().group_name
    project = stage.decoder.layers[0].gen.self_attention.linear_qkv
    project.register_forward_pre_hook(lambda *_: early.append(counter.moved[cp_group]))
    with counter:
        out = stage.decoder(hidden, attention_mask=None, packed_seq_params=stage.pack_context(batch))
        out.sum().backward()
    names = {
        "cp": cp_group,
        "tp": parallel_state.get_tensor_model_parallel_group().group_name,
    }
    width, layers = PRECISIONS[precision], MODEL.num_layers
    computed = {
        "cp": gathered_keys_values(MODEL, layout.rows, cp, tp, width).total,
        "tp": qkv_over_tp(MODEL, layout.rows, tp, width).total + sequence_parallel(MODEL, layout.rows, tp, width).total,
    }
    parallel_groups.leave()
    found = {kind: {"counted": counter.moved[names[kind]] / layers, "computed": computed[kind]} for kind in names}
    found["cp"]["early"] = early[0]
    found["cp"]["forward"] = gathered_keys_values(MODEL, layout.rows, cp, tp, width).forward
    return found


def main() -> None:
    """Run."""
    results = {
        f"{name} {precision}": count(tp, cp, recompute, precision)
        for name, (tp, cp, recompute) in LAYOUTS.items()
        for precision in PRECISIONS
    }
    if dist.get_rank() == 0:
        sys.stdout.write(f"RESULTS {json.dumps(results)}\n")
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
