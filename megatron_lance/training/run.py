"""A whole run: join the groups, build everything, train; or describe what would happen.

Station: validated configuration -> groups, model, feed -> loop.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_lance.checkpoint import store
from megatron_lance.checkpoint.everywhere import faults, sound
from megatron_lance.checkpoint.hf_lance import WeightSource, with_rope_of
from megatron_lance.checkpoint.manifest import (
    Checkpoint,
    DataIdentity,
    changed_settings,
    check_resumable,
    checkpoints_folder,
    damage,
    find_checkpoint,
    step_folder,
)
from megatron_lance.checkpoint.optimizer_state import kind_of_save
from megatron_lance.checkpoint.saver import Saver
from megatron_lance.checkpoint.store import PendingWeights, TrainingState
from megatron_lance.config.loader import ConfigError, dump_yaml
from megatron_lance.config.schema import RunConfig
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.layout import Layout
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.groups import Groups
from megatron_lance.profiling.memory import memory_per_rank
from megatron_lance.sampling.engine import Encoders
from megatron_lance.training.feed import Feed
from megatron_lance.training.loop import train
from megatron_lance.training.metrics import StepMetrics
from megatron_lance.training.preview import Preview
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


def _open(run: RunConfig) -> tuple[Tokenizer, DataIdentity, Checkpoint | None]:
    """Open what a run reads from disk and check it; needs no process group.

    Returns:
        (tokenizer, what the data position refers to, the checkpoint to go on from).
    """
    check_settings(run)
    run_dir = Path(run.training.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"training.run_dir '{run_dir}': is a file; give a folder, existing or new")
    tokenizer = Tokenizer(run.data.tokenizer)
    data = DataIdentity(tokenizer.sha256, PackIndex.open(run.data.pack_index).hash)
    checkpoint = find_checkpoint(run.training)
    if checkpoint is not None:
        check_resumable(checkpoint, run, data)
    _make_run_dir(run_dir)
    return tokenizer, data, checkpoint


def _sound(
    checkpoint: Checkpoint | None, source: WeightSource | Checkpoint, run: RunConfig, data: DataIdentity
) -> Checkpoint | None:
    """The checkpoint to go on from, its files or those of the initial weights held against their digests."""
    if isinstance(source, Checkpoint) and (found := faults(source)):
        raise damage(source, found)
    if checkpoint is not None:
        checkpoint = sound(checkpoint, run.training)
        check_resumable(checkpoint, run, data)
    return checkpoint


def _make_run_dir(run_dir: Path) -> None:
    """Make the run's folder, so that a run that could not save does not start."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise ConfigError(
            f"training.run_dir '{run_dir}': cannot be written ({error.strerror}); correct its rights or give another "
            "folder"
        ) from error


def _is_only_rewritten(run: RunConfig, checkpoint: Checkpoint) -> bool:
    """Whether no step is left, but the state is wanted in another kind or in another run's folder."""
    done = checkpoint.manifest.step
    wanted = checkpoint.manifest.optimizer != kind_of_save(run, done)
    elsewhere = not step_folder(checkpoints_folder(run.training), done).exists()
    return done >= run.training.train_iters and (wanted or elsewhere)


def _announce(run: RunConfig, groups: Groups, feed: Feed, checkpoint: Checkpoint | None) -> None:
    """Write the resolved configuration and say what starts; on the first rank."""
    if dist.get_rank() != 0:
        return
    run_dir = Path(run.training.run_dir)
    (run_dir / "config.yaml").write_text(dump_yaml(run), encoding="utf-8")
    degrees = f"tp {groups.tp} x cp {groups.cp} x pp {groups.pp} x dp {groups.dp}"
    logger.info("%s on %s, %d packs in the index, run folder %s", degrees, groups.device, len(feed.index), run_dir)
    if checkpoint is None:
        return
    done = checkpoint.manifest.step
    logger.info("going on from %s after step %d", checkpoint.folder, done)
    for change in changed_settings(checkpoint, run):
        logger.info("changed since then: %s", change)
    if _is_only_rewritten(run, checkpoint):
        logger.info("nothing to train: its state is written again as %s", kind_of_save(run, done))
    elif done >= run.training.train_iters:
        logger.warning("nothing to train: training.train_iters %d are done; raise it", run.training.train_iters)


def train_run(run: RunConfig) -> list[StepMetrics]:
    """Train, and leave the process groups as they are.

    Returns:
        the metrics of the steps of this process.

    Raises:
        UserError: if the run cannot start or cannot go on.
    """
    run = replace(run, model=with_rope_of(run.model, run.training.init_from))
    tokenizer, data, checkpoint = _open(run)
    source = weight_source(run) if checkpoint is None else PendingWeights()
    groups = parallel_groups.initialize(run.parallel, run.training.seed)
    checkpoint = _sound(checkpoint, source, run, data)
    feed = Feed(run, groups, tokenizer)
    trainee = build(run, groups, tokenizer.size, source)
    average = trainee.average
    shards = () if average is None else average.shards
    state = TrainingState(trainee.chunks, trainee.optimizer, trainee.scheduler, shards)
    _announce(run, groups, feed, checkpoint)
    steps_done = 0
    if checkpoint is not None:
        store.load(checkpoint, state)
        if average is not None and not checkpoint.manifest.has_ema:
            logger.info("%s has no averaged weights: the average begins as its weights", checkpoint.folder)
            average.restart()
        feed.encoder.broken.update(checkpoint.manifest.broken_media)
        steps_done = checkpoint.manifest.step
    saver = Saver(run, state, data, feed.encoder.broken)
    if checkpoint is not None and _is_only_rewritten(run, checkpoint):
        saver.save(steps_done)
    encoders = Encoders(feed.encoder.decoder, feed.encoder.vit, feed.encoder.vae)
    preview = Preview(run, trainee, groups, tokenizer, encoders) if run.preview.captions else None
    return train(run, trainee, feed, groups, saver, steps_done, preview)


def start(run: RunConfig) -> None:
    """Train.  What can be checked without a process group is checked before one exists.

    Raises:
        UserError: if the run cannot start or cannot go on.
    """
    train_run(run)
    parallel_groups.destroy()
