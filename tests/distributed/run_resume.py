"""Do a list of jobs on these ranks, one after another in one process.

    torchrun --nproc-per-node N run_resume.py JOBS.json

A job is {"config": FILE, "overrides": [...], "weights": FILE or null}.  Without `weights` it trains; the first rank
writes <run_dir>/error.txt if the run is refused.  With `weights` it fills the model from the run's checkpoint, or from
`training.init_from`, and writes its public tensors to that file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_lance.config.errors import UserError
from megatron_lance.config.loader import load_config
from megatron_lance.config.schema import RunConfig

# megatron-core's checkpoint writer spawns a process that imports this file: heavy imports are inside the functions.


def train(run: RunConfig) -> None:
    """Train, or write down why not."""
    from megatron_lance.training.run import train_run
    from megatron_lance.training.signals import StopRequest

    try:
        with StopRequest(run.training.stop_after_minutes) as stop:
            train_run(run, stop)
    except UserError as error:
        folder = Path(run.training.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(str(error), encoding="utf-8")


def write_weights(run: RunConfig, file: str) -> None:
    """Public tensors of a model under this layout, from its checkpoint or from the public layout."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from safetensors.torch import save_file

    from megatron_lance.checkpoint.hf_lance import FolderSource, gather_public, global_parameters, load_weights
    from megatron_lance.checkpoint.manifest import checkpoint_at
    from megatron_lance.checkpoint.store import load_model
    from megatron_lance.model.lance_model import build_stages
    from megatron_lance.model.transformer_config import transformer_config
    from megatron_lance.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(run.parallel, seed=1)
    stages = build_stages(transformer_config(run.model, run.parallel, run.training.precision), run.model, 300)
    if run.training.init_from:
        source = FolderSource(run.training.init_from, run.model)
        load_weights(stages, source, run.model, tp_rank=groups.tp_rank, tp=groups.tp)
    else:
        load_model(checkpoint_at(Path(run.training.run_dir)), stages)
    own = ((name, parameter.detach()) for name, parameter in global_parameters(stages))
    public = dict(gather_public(own, run.model, parallel_state.get_tensor_model_parallel_group()))
    parts: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, {key: tensor.clone() for key, tensor in public.items()})
    if dist.get_rank() == 0:
        save_file({key: tensor for part in parts for key, tensor in part.items()}, file)


def main() -> None:
    """Run."""
    from megatron_lance.config.logs import set_up_logging
    from megatron_lance.parallel import groups as parallel_groups

    set_up_logging(first_rank=True)
    jobs: list[dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for job in jobs:
        run = load_config([job["config"]], job["overrides"])
        if job["weights"]:
            write_weights(run, job["weights"])
        else:
            train(run)
        parallel_groups.leave()
    parallel_groups.destroy()


if __name__ == "__main__":
    main()
