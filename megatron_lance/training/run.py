"""A whole run: join the groups, build everything, train; or describe what would happen.

Station: validated configuration -> groups, model, feed -> loop.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_lance.checkpoint import store
from megatron_lance.checkpoint.everywhere import faults, first_ranks, sound
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
from megatron_lance.config.errors import Stopped
from megatron_lance.config.fp8 import row_alignment
from megatron_lance.config.loader import ConfigError, dump_yaml
from megatron_lance.config.schema import RunConfig
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.position import LeftOut
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.model.layer_specs import check_transformer_engine
from megatron_lance.packing.attention_plan import AttentionPlan
from megatron_lance.packing.layout import Layout
from megatron_lance.parallel import groups as parallel_groups
from megatron_lance.parallel.groups import Groups
from megatron_lance.profiling.memory import memory_per_rank, offloaded_bytes
from megatron_lance.sampling.engine import Encoders
from megatron_lance.sampling.prompt_list import Line
from megatron_lance.training.events import EventLog
from megatron_lance.training.feed import Feed
from megatron_lance.training.guards import guarded
from megatron_lance.training.looks import Looks
from megatron_lance.training.loop import Session
from megatron_lance.training.metrics import StepMetrics, written_in
from megatron_lance.training.ownership import owned
from megatron_lance.training.preview import Preview, read_prompts
from megatron_lance.training.rewind import train_with_rewinds
from megatron_lance.training.setup import Trainee, build, weight_source
from megatron_lance.training.signals import StopRequest
from megatron_lance.training.validation import Validation

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
    layout = Layout.build(planned.pack, cp, tp, row_alignment(run))
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


def _agreed(
    checkpoint: Checkpoint | None, source: WeightSource | Checkpoint, run: RunConfig, data: DataIdentity
) -> tuple[Checkpoint | None, WeightSource | Checkpoint]:
    """The checkpoint to go on from, as the first rank finds it; its files, or the initial weights', are looked through.

    Args:
        checkpoint: what this rank found.
        source: initial weights; needed again if the first rank found none.
        run: the whole configuration.
        data: what a data position refers to.
    """
    own = checkpoint
    checkpoint = first_ranks(lambda: find_checkpoint(run.training))  # again: the run before may have ended meanwhile
    if checkpoint is not None:
        checkpoint = sound(checkpoint, run.training)
        check_resumable(checkpoint, run, data)
        return checkpoint, PendingWeights()
    source = source if own is None else weight_source(run)
    if isinstance(source, Checkpoint) and (found := faults(source)):
        raise damage(source, found)
    return None, source


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
    with written_in(run_dir):
        (run_dir / "config.yaml").write_text(dump_yaml(run), encoding="utf-8")
    degrees = f"tp {groups.tp} x cp {groups.cp} x pp {groups.pp} x dp {groups.dp}"
    logger.info("%s on %s, %d packs in the index, run folder %s", degrees, groups.device, len(feed.index), run_dir)
    if run.parallel.offload_layers:
        size = offloaded_bytes(run) / 2**20
        told = "first layers of each model chunk that wait on the host: %d, about %.0f MiB of a micro-batch"
        logger.info(told, run.parallel.offload_layers, size)
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


def _looks(
    run: RunConfig, trainee: Trainee, feed: Feed, groups: Groups, tokenizer: Tokenizer, prompts: Sequence[Line]
) -> Looks:
    """Validation and previews as far as they are configured."""
    validation = Validation(run, trainee, feed, groups, tokenizer) if run.validation.pack_index else None
    encoders = Encoders(feed.encoder.decoder, feed.encoder.vit, feed.encoder.vae)
    preview = Preview(run, trainee, groups, tokenizer, encoders, prompts) if prompts else None
    return Looks(run, validation, preview)


def train_run(run: RunConfig, stop: StopRequest) -> list[StepMetrics]:
    """Train, and leave the process groups as they are.

    Args:
        run: the whole configuration.
        stop: what this process is asked meanwhile.

    Returns:
        the metrics of the steps of this process.

    Raises:
        UserError: if the run cannot start or cannot go on.
    """
    if run.model.transformer_impl == "transformer_engine":
        check_transformer_engine(run.fp8.recipe)
    run = replace(run, model=with_rope_of(run.model, run.training.init_from))
    prompts = read_prompts(run) if run.preview.prompts else []
    tokenizer, data, checkpoint = _open(run)
    source = weight_source(run) if checkpoint is None else PendingWeights()
    patience = max(10.0, run.training.hang_seconds / 60 + 5)  # minutes; the watchdog speaks first
    groups = parallel_groups.initialize(run.parallel, run.training.seed, patience)
    with owned(Path(run.training.run_dir)):
        checkpoint, source = _agreed(checkpoint, source, run, data)
        return _train(run, stop, groups, tokenizer, data, prompts, checkpoint, source)


def _train(
    run: RunConfig,
    stop: StopRequest,
    groups: Groups,
    tokenizer: Tokenizer,
    data: DataIdentity,
    prompts: Sequence[Line],
    checkpoint: Checkpoint | None,
    source: WeightSource | Checkpoint,
) -> list[StepMetrics]:
    """Build everything and train, from the checkpoint or else from the initial weights."""
    feed = Feed(run, groups, tokenizer)
    trainee = build(run, groups, tokenizer.size, source)
    average = trainee.average
    shards = () if average is None else average.shards
    state = TrainingState(trainee.chunks, trainee.optimizer, trainee.scheduler, shards)
    looks = _looks(run, trainee, feed, groups, tokenizer, prompts)
    _announce(run, groups, feed, checkpoint)
    steps_done = 0
    if checkpoint is not None:
        store.load(checkpoint, state)
        if average is not None and not checkpoint.manifest.has_ema:
            logger.info("%s has no averaged weights: the average begins as its weights", checkpoint.folder)
            average.restart()
        feed.encoder.broken.update(checkpoint.manifest.broken_media)
        steps_done = checkpoint.manifest.step
        feed.leave_out([LeftOut(*gap) for gap in checkpoint.manifest.left_out])
    events = EventLog(Path(run.training.run_dir), enabled=dist.get_rank() == 0)

    def published(step: int, folder: Path) -> None:
        events.write(step, "checkpoint", folder=str(folder))

    saver = Saver(run, state, data, feed.encoder.broken, feed.left_out, published)
    if checkpoint is not None and _is_only_rewritten(run, checkpoint):
        saver.save(steps_done, is_rewritten=True)
        saver.finish()
        return []
    with closing(feed), guarded(run.training, stop, events) as guards:
        degrees = {"tp": groups.tp, "cp": groups.cp, "pp": groups.pp, "dp": groups.dp}
        events.write(steps_done, "started", ranks=dist.get_world_size(), **degrees)
        session = Session(run, groups, trainee, feed, saver, looks, guards)
        return train_with_rewinds(session, state, steps_done)


def start(run: RunConfig, stop: StopRequest) -> None:
    """Train.  What can be checked without a process group is checked before one exists.

    Args:
        run: the whole configuration.
        stop: what this process is asked meanwhile.

    Raises:
        UserError: if the run cannot start or cannot go on.
    """
    try:
        train_run(run, stop)
    except Stopped:  # all ranks are here, and leave together
        parallel_groups.destroy()
        raise
    parallel_groups.destroy()
