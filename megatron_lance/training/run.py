"""A whole run: join the groups, build everything, train; or describe what would happen.

Station: validated configuration -> groups, model, feed -> loop.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from megatron_lance.config.loader import ConfigError, dump_yaml
from megatron_lance.config.schema import RunConfig
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.layout import Layout
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.profiling.memory import memory_per_rank
from megatron_lance.training.feed import Feed
from megatron_lance.training.loop import train
from megatron_lance.training.setup import build, weight_source

logger = logging.getLogger(__name__)


def check_settings(run: RunConfig) -> None:
    """Raise ConfigError unless everything a training run cannot do without is set."""
    for name in ("pack_index", "tokenizer"):
        if not getattr(run.data, name):
            raise ConfigError(f"data.{name} '': is not set; give the folder, e.g. data.{name}=PATH")
    if not run.data.sources:
        raise ConfigError("data.sources []: is empty; list at least one data set")


def describe(run: RunConfig, world_size: int) -> str:
    """What a run would do, as text: parameters and memory per rank, the first pack, its layout and its mask.

    Raises:
        UserError: if the run could not start.
    """
    check_settings(run)
    parallel = run.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    planned = PackIndex.open(run.data.pack_index).pack(0)
    layout = Layout.build(planned.pack, cp, tp, parallel.region_alignment)
    und, gen = layout.shard_rows
    return "\n".join(
        [
            "memory per rank",
            *(f"  {memory.line()}" for memory in memory_per_rank(run, world_size)),
            "layout of pack 0",
            *(f"  {line}" for line in layout.describe().splitlines()),
            f"  each tp rank: {und} und rows, {gen} gen rows",
            str(planned),
            "attention of pack 0 (rows: queries, columns: keys; # all, + some, . none)",
            AttentionPlan.from_pack(planned.pack).picture(),
        ]
    )


def start(run: RunConfig) -> None:
    """Train.  What can be checked without a process group is checked before one exists.

    Raises:
        UserError: if the run cannot start or cannot go on.
    """
    check_settings(run)
    tokenizer = Tokenizer(run.data.tokenizer)
    source = weight_source(run)
    packs = len(PackIndex.open(run.data.pack_index))
    groups = parallel_groups.initialize(run.parallel, run.training.seed)
    feed = Feed(run, groups, tokenizer)
    trainee = build(run, groups, tokenizer.size, source)
    if dist.get_rank() == 0:
        run_dir = Path(run.training.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_yaml(run), encoding="utf-8")
        degrees = f"tp {groups.tp} x cp {groups.cp} x pp {groups.pp} x dp {groups.dp}"
        logger.info("%s on %s, %d packs in the index, run folder %s", degrees, groups.device, packs, run_dir)
    train(run, trainee, feed, groups)
    parallel_groups.destroy()
