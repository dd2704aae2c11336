"""Saves of a run: at once, or in the background while training goes on.

Station: loop -> [saver] -> run folder.  A save plans what each rank writes (a collective), and hands the tensors to a
writer (megatron-core's AsyncCallsQueue), a forked process that holds them as they were.  The writer hashes what it
wrote.  When all ranks are done, which all ranks find out together after the same step, one rank adds
digests and manifest, renames the folder and points `latest` to it.

A save that fails leaves the checkpoints before it as they were.  Every save writes under a name of its own, so a writer
that outlives its killed run cannot touch what the next run writes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lance.checkpoint.digests import digests_of, written_by
from megatron_lance.checkpoint.everywhere import of_all_ranks, together, unwritable
from megatron_lance.checkpoint.files import publish, sync, write_text
from megatron_lance.checkpoint.manifest import (
    LATEST_FILE,
    BrokenMedia,
    DataIdentity,
    Manifest,
    StoreError,
    checkpoints_folder,
    latest_step,
    step_folder,
)
from megatron_lance.checkpoint.optimizer_state import kind_of_save
from megatron_lance.checkpoint.retention import remove_old
from megatron_lance.checkpoint.store import TrainingState, state_tree
from megatron_lance.config.schema import RunConfig
from megatron_lance.data.position import LeftOut

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0  # between looks at the processes of a writer


@dataclass(frozen=True)
class _Save:
    """A save that is under way.

    Attributes:
        step: steps done.
        kind: of the optimizer's state.
        target: the checkpoint's folder.
        partial: what is written into.
        known: broken media of all ranks.
        left_out: global batches that the run leaves out.
        start: when it began, by time.perf_counter.
        has_writer: whether this rank has something to write.
        is_rewritten: whether `latest` stays where it is if that is a later step.
    """

    step: int
    kind: str
    target: Path
    partial: Path
    known: BrokenMedia
    left_out: tuple[LeftOut, ...]
    start: float
    has_writer: bool
    is_rewritten: bool


@dataclass(frozen=True)
class SaveTimes:
    """What saving cost.

    Attributes:
        stall_seconds: that training stood still.
        seconds: from the begin of a save to its publication.
    """

    stall_seconds: float
    seconds: float


class Saver:
    """Writes the checkpoints of a run; every method but `take_times` is a collective of the world.

    Args:
        run: the resolved configuration.
        state: of this rank.
        data: what the data position refers to.
        broken: media this rank knows to be broken; those of all ranks are saved.
        left_out: global batches that the run leaves out, the same on every rank; may change between saves.
        published: called with step and folder once a checkpoint is complete.
    """

    def __init__(
        self,
        run: RunConfig,
        state: TrainingState,
        data: DataIdentity,
        broken: BrokenMedia,
        left_out: Sequence[LeftOut] = (),
        published: Callable[[int, Path], None] = lambda step, folder: None,
    ) -> None:
        self.published = published
        self.run, self.state, self.data, self.broken, self.left_out = run, state, data, broken, left_out
        self.queue = AsyncCallsQueue()
        self.pending: _Save | None = None
        self.stalled = self.seconds = self.pending_stall = self.since = 0.0

    def save(self, step: int, is_rewritten: bool = False) -> Path:
        """Begin the checkpoint of a step; without `training.async_save` it is complete on return.

        At most one save is under way: the next one waits for it.

        Args:
            step: steps done.
            is_rewritten: the state was loaded and not trained: `latest` stays where it is if that is a later step.

        Returns:
            the folder that the checkpoint has or will have.

        Raises:
            StoreError: on every rank, if the folder cannot be written or the disk is too full.
        """
        if self.pending is not None and dist.get_rank() == 0:
            logger.info("the save of step %d waits for that of step %d", step, self.pending.step)
        self.finish()
        with self._standing_still():
            start = self.since
            if self.run.parallel.overlap_param_gather:
                for chunk in self.state.chunks:
                    chunk.start_param_sync(force_sync=True)
            kind = kind_of_save(self.run, step)
            tree = state_tree(self.state, kind, is_loading=False)
            needed = sum(of_all_ranks(_bytes_written(tree)))
            known = {key: cause for each in of_all_ranks(dict(self.broken)) for key, cause in each.items()}
            target = step_folder(checkpoints_folder(self.run.training), step)
            partial = together(target, lambda: _prepare(target, needed))[0]
            assert partial is not None  # the first rank's
            with _written(target, partial), helpers_spared():
                request = dist_checkpointing.save(tree, str(partial), async_sharded_save=True)
                assert isinstance(request, AsyncRequest)
                has_writer = request.async_fn is not None
                left_out = tuple(self.left_out)
                self.pending = _Save(step, kind, target, partial, known, left_out, start, has_writer, is_rewritten)
                self._start_writer(self.pending, request)
        if not self.run.training.async_save:
            self.finish()
        return target

    def _start_writer(self, save: _Save, request: AsyncRequest) -> None:
        if request.async_fn is not None:
            request = request._replace(async_fn=_WriteAndHash(request.async_fn, save.partial, dist.get_rank()))
        request.finalize_fns.append(self._publish)
        together(save.target, lambda: self.queue.schedule_async_request(request))

    def poll(self) -> None:
        """Publish the save that is under way if all ranks have written it."""
        self._finalise(blocking=False)

    def finish(self) -> None:
        """Wait for the save that is under way, if any, and publish it."""
        self._finalise(blocking=True)

    def take_times(self) -> SaveTimes:
        """What saving cost since the last call; `seconds` is 0 unless a checkpoint was published."""
        times = SaveTimes(self.stalled, self.seconds)
        self.stalled = self.seconds = 0.0
        return times

    def _finalise(self, blocking: bool) -> None:
        if self.pending is None:
            return
        with self._standing_still(), _written(self.pending.target, self.pending.partial):
            self.queue.maybe_finalize_async_calls(blocking)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Count the time that training waits."""
        self.since = time.perf_counter()
        yield
        passed = time.perf_counter() - self.since
        self.stalled += passed
        self.pending_stall = self.pending_stall + passed if self.pending is not None else 0.0

    def _publish(self) -> None:
        """Gather digests, write the manifest, give the folder its name; all ranks have written their parts."""
        save = self.pending
        assert save is not None
        rank, root = dist.get_rank(), save.target.parent
        own = together(save.target, lambda: _digests_of_rank(save.partial, rank, save.has_writer))
        digests = {name: digest for each in own for name, digest in each.items()}

        def publish_it() -> None:
            manifest = Manifest.of(
                save.partial,
                self.run,
                save.step,
                dist.get_world_size(),
                self.data,
                save.known,
                optimizer=save.kind,
                left_out=save.left_out,
            )
            manifest.write(save.partial, digests)
            publish(save.partial, save.target)
            if not (save.is_rewritten and (latest_step(root) or 0) > save.step):
                write_text(root / LATEST_FILE, save.target.name + "\n")
            remove_old(root, save.step, self.run.training)

        together(save.target, publish_it if rank == 0 else lambda: None)
        now = time.perf_counter()
        self.seconds = now - save.start
        if rank == 0:
            stall = self.pending_stall + now - self.since
            logger.info("saved %s in %.2f s, of which training waited %.2f s", save.target, self.seconds, stall)
        self.published(save.step, save.target)
        self.pending = None


@contextmanager
def helpers_spared() -> Iterator[None]:
    """Processes that are started meanwhile never see SIGTERM and SIGUSR1; this one does, if need be later.

    megatron-core starts one for the results of writers and keeps it for all saves.  A scheduler that tells a run to
    stop signals every process of it, and without that one the save that the run stops with would fail.
    """
    resource_tracker.ensure_running()  # or else it starts with the first of them, and unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _WriteAndHash:
    """A rank's writer: megatron-core's, then the digests of what it wrote, noted beside it.

    Args:
        write: megatron-core's.
        folder: that it writes into.
        rank: of this process.
    """

    def __init__(self, write: Callable[..., None], folder: Path, rank: int) -> None:
        self.write, self.folder, self.rank = write, folder, rank

    def __call__(self, *arguments: Any, **named: Any) -> None:
        threading.Thread(target=_end_with_a_killed_child, daemon=True).start()
        self.write(*arguments, **named)
        mine = [name for name in written_by(self.folder, self.rank) if name.startswith(f"__{self.rank}_")]
        write_text(_note(self.folder, self.rank), json.dumps(digests_of(self.folder, mine)))


def _end_with_a_killed_child() -> None:
    """End this writer when a process that writes for it was killed: megatron-core 0.16.1 waits for it without end."""
    while True:
        time.sleep(_LOOK_SECONDS)
        for child in psutil.Process().children():
            try:  # the child stays for megatron-core to reap
                found = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # reaped meanwhile
                continue
            if found is not None and found.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                ended = f"process {child.pid} was ended by signal {found.si_status}"
                sys.stderr.write(f"writer of a checkpoint: {ended}; is memory short?\n")
                sys.stderr.flush()
                os._exit(1)


def _note(folder: Path, rank: int) -> Path:
    """Where a rank's writer notes digests."""
    return folder / f"__{rank}_digests.json"


def _digests_of_rank(folder: Path, rank: int, has_writer: bool) -> dict[str, str]:
    """Digests of all that a rank wrote, by its writer or, what is not tensors, since then."""
    found: dict[str, str] = {}
    if has_writer:
        note = _note(folder, rank)
        found = json.loads(note.read_text(encoding="utf-8"))
        note.unlink()
    rest = [name for name in written_by(folder, rank) if name not in found]
    for name in rest:  # megatron-core brings only tensors to the disk
        sync(folder / name)
    return found | digests_of(folder, rest)


def _prepare(target: Path, needed: int) -> Path | None:
    """On the first rank: an empty folder to write into, on a disk with room for `needed` bytes."""
    if dist.get_rank() != 0:
        return None
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < needed:
        partial.rmdir()
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes are needed, {free} are free")
    return partial


def _bytes_written(tree: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    own = (value for value in nested_values(tree) if isinstance(value, kinds) and is_main_replica(value.replica_id))
    return sum(value.data.numel() * value.data.itemsize for value in own)


@contextmanager
def _written(target: Path, partial: Path) -> Iterator[None]:
    """Say what goes wrong with files as a StoreError, and clear away what was written.

    A rank that fails in the midst of megatron-core's collectives ends with an error of its own; the launcher ends the
    others.
    """
    try:
        yield
    except StoreError:
        _give_up(partial)
        raise
    except CheckpointException as error:
        causes = [_with_room(str(cause), target) for cause, _ in error.failures.values()]
        _give_up(partial)
        raise unwritable(target, causes[0] if causes else "another rank failed") from error
    except (CheckpointingException, OSError, RuntimeError) as error:
        cause = _with_room(str(error), target)
        _give_up(partial)
        raise unwritable(target, cause) from error


def _give_up(partial: Path) -> None:
    """Remove what was written: the room it took may be what the next save needs."""
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)


def _with_room(cause: str, target: Path) -> str:
    """A cause, with the room on the disk: torch's own words for a full one are about positions in a file."""
    if "results_queue should not be empty" in cause:  # megatron-core's words for a writer that left nothing
        cause = "the writer of it ended before it was done"
    return f"{cause} ({shutil.disk_usage(target.parent).free} bytes are free there)"
