"""Build the model of several layouts on these ranks and write down what each rank holds.

Arguments: the file to write, a configuration, then one text of overrides per layout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_lance.config.loader import load_config
from megatron_lance.model.lance_model import build_stages
from megatron_lance.model.transformer_config import transformer_config
from megatron_lance.parallel import groups as parallel_groups


def count(config: str, overrides: list[str]) -> list[tuple[int, int]]:
    """(pipeline rank, parameters) of every rank under one layout."""
    run = load_config([config], overrides)
    groups = parallel_groups.initialize(run.parallel, seed=1)
    stages = build_stages(transformer_config(run.model, run.parallel, "float32"), run.model, tokenizer_size=300)
    own = (groups.pp_rank, sum(p.numel() for stage in stages for p in stage.parameters()))
    found: list[tuple[int, int]] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    parallel_state.destroy_model_parallel()
    return found


def main() -> None:
    """Run."""
    out, config, *layouts = sys.argv[1:]
    counts = [count(config, layout.split()) for layout in layouts]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(counts), encoding="utf-8")
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
