"""Background reading: the tasks of coming steps, done ahead in worker processes.

Station: shares -> [background reading] -> encoders.  In: which tasks a step has.  Out: what they give, step by step, in
the order of the tasks, the same bits as without workers.  torch's DataLoader owns the processes; here is what it leaves
out: a worker that dies is replaced and its task done again, a picture or clip whose decoding ends a worker twice or
takes too long is given up, at most a number of steps is held, and workers end with the process that started them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from threading import Event, Thread
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megatron_lance.config.errors import UserError
from megatron_lance.data.reading import Media, StepRead, TaskReader, without
from megatron_lance.data.shares import ItemKey, MediaTask, Task
from megatron_lance.packing.batch import PackTokens

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between looks at the workers while a result is awaited."""
TASKS_PER_WORKER = 2
"""Tasks that a worker has or holds ready."""
DEATHS_PER_ITEM = 2
"""Workers that may end while they decode an item, before it is given up."""
DEATHS_IN_A_ROW = 5
"""Workers that may end without a result in between, before reading is given up."""
LOST_IN_A_ROW = 8
"""Items given up because their workers ended, without one decoded in between, before reading is given up."""
_PID, _NUMBER, _BUSY, _DECODING_SINCE, _FIELDS = range(5)
"""What a worker says of itself: process, number of its task, whether it does it, since when it decodes (0: not yet)."""


@dataclass(frozen=True)
class Ahead:
    """How a rank reads ahead.

    Attributes:
        workers: processes; 0: none.
        steps: read before they are asked for.
        seconds: that a worker may decode a picture or clip.
    """

    workers: int
    steps: int
    seconds: float


class ReaderError(UserError):
    """Worker processes end again and again."""


class _Stopped(RuntimeError):
    """Nobody wants what is being read any more."""


@dataclass(frozen=True)
class _Job:
    """A task with its number; `skip` says why it is not to be done."""

    number: int
    task: Task
    skip: str


@dataclass(frozen=True)
class _Result:
    """What came of a job.

    Attributes:
        value: the result, or the error that ends the run.
        notes: what was logged meanwhile.
        retries: reads of remote storage that were repeated.
    """

    value: PackTokens | Media | UserError
    notes: tuple[str, ...]
    retries: int


class _Notes(logging.Handler):
    """Keeps warnings, for the process that reports."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        """All lines since the last call."""
        lines, self.lines = tuple(self.lines), []
        return lines


_notes = _Notes()


def _begin_worker(_: int) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    package = logging.getLogger("megatron_lance")
    package.addHandler(_notes)
    package.propagate = False


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone, however that ended.

    torch's own watch looks at the parent in the system's sense, the fork server, which lives as long as a worker does.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _allow_open_files() -> None:
    """Raise the soft limit of open files to the hard one: every tensor that waits in shared memory is such a file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Jobs(Dataset[_Result]):
    """Does jobs in a worker, which says in `states` what it is at."""

    def __init__(self, reader: TaskReader, states: Any) -> None:
        self._reader, self._states = reader, states

    def __getitem__(self, job: _Job) -> _Result:
        if job.skip:
            assert isinstance(job.task, MediaTask)
            return _Result(without(job.task, job.skip), (), 0)
        at = get_worker_info().id * _FIELDS  # type: ignore[union-attr]  # this is a worker
        states, retries = self._states, self._reader.packs.retries
        states[at + _PID], states[at + _NUMBER], states[at + _BUSY] = os.getpid(), job.number, True

        def decoding() -> None:
            states[at + _DECODING_SINCE] = time.monotonic()

        try:
            value: PackTokens | Media | UserError = _shared(self._reader.read(job.task, decoding))
        except UserError as error:
            value = error
        finally:
            states[at + _DECODING_SINCE] = states[at + _BUSY] = 0
        return _Result(value, _notes.take(), self._reader.packs.retries - retries)


def _shared(value: PackTokens | Media) -> PackTokens | Media:
    """The value, its tensors in shared memory already: a result that finds no room on its way would never arrive.

    Raises:
        ReaderError: if there is no room.
    """
    if isinstance(value, PackTokens):
        tensors = [value.token_ids, value.ce_rows, value.ce_labels]
    else:
        tensors = [one.data for one in value if not isinstance(one, ValueError)]
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise ReaderError(
            f"data.steps_ahead, data.workers: what is read ahead finds no room in shared memory ({error}); make "
            "/dev/shm larger (for a container --shm-size), lower data.steps_ahead, or set data.workers=0"
        ) from error
    return value


def _itself(result: Any) -> Any:
    return result


class _Workers:
    """Does an endless row of tasks in worker processes and gives the results in its order.

    Attributes:
        given_up: cause by item, of those whose decoding took too long or ended workers.
        restarts: of the worker processes.
        retries: reads of remote storage that were repeated.

    Args:
        reader: copied into every worker.
        tasks: to do.
        ahead: number of workers, bound of their decoding.
        known: cause by item, of those that are not to be tried.
        stop: ends waiting.
    """

    def __init__(
        self,
        reader: TaskReader,
        tasks: Iterator[Task],
        ahead: Ahead,
        known: Mapping[ItemKey, str],
        stop: Event,
    ) -> None:
        self._tasks, self._ahead, self._known, self._stop = tasks, ahead, known, stop
        self._number = count()
        self._waiting: deque[_Job] = deque()
        self._deaths: Counter[int] = Counter()
        self._deaths_in_a_row = self._lost_in_a_row = 0
        self.given_up: dict[ItemKey, str] = {}
        self.restarts = self.retries = 0
        _allow_open_files()
        context = multiprocessing.get_context("forkserver")  # a fork of a rank would copy its threads' locks
        context.set_forkserver_preload(["__main__", __name__])
        self._states = context.RawArray("d", ahead.workers * _FIELDS)
        self._loader: DataLoader[_Result] = DataLoader(
            _Jobs(reader, self._states),
            batch_size=None,
            sampler=self,
            num_workers=ahead.workers,
            prefetch_factor=TASKS_PER_WORKER,
            collate_fn=_itself,
            worker_init_fn=_begin_worker,
            multiprocessing_context=context,
            timeout=LOOK_SECONDS,
            generator=torch.Generator(),  # the global random state is left alone
        )
        self._results: Iterator[_Result] | None = None

    def __iter__(self) -> Iterator[_Job]:
        """What workers are to do: tasks without a result so far, then new ones."""
        for job in tuple(self._waiting):
            yield self._job(job.number, job.task)
        for task in self._tasks:
            job = self._job(next(self._number), task)
            self._waiting.append(job)
            yield job

    def _job(self, number: int, task: Task) -> _Job:
        key = task.key if isinstance(task, MediaTask) else None
        return _Job(number, task, "" if key is None else self.given_up.get(key) or self._known.get(key, ""))

    def next(self) -> tuple[Task, PackTokens | Media]:
        """The next task and its result.

        Raises:
            UserError: that the task met.
            ReaderError: if workers end again and again.
        """
        while True:
            result = self._take()
            if result is not None:
                break
        self._deaths_in_a_row = 0
        for note in result.notes:
            logger.warning(note)
        self.retries += result.retries
        job = self._waiting.popleft()
        self._deaths.pop(job.number, None)
        if isinstance(result.value, tuple) and not any(isinstance(one, ValueError) for one in result.value):
            self._lost_in_a_row = 0
        if isinstance(result.value, UserError):
            raise result.value
        return job.task, result.value

    @property
    def pids(self) -> list[int]:
        """Of the processes that have begun a task."""
        return [int(pid) for pid in self._states[_PID::_FIELDS] if pid]

    def close(self) -> None:
        """End the processes."""
        self._results = None

    def _take(self) -> _Result | None:
        """The next result; None where it is worth another try."""
        if self._stop.is_set():
            raise _Stopped
        try:
            if self._results is None:
                self._states[:] = [0.0] * len(self._states)
                self._results = iter(self._loader)
            return next(self._results)
        except RuntimeError as error:
            if "timed out" not in str(error) and "exited unexpectedly" not in str(error):
                raise
            cause = "" if "timed out" in str(error) else str(error)
        except (OSError, EOFError) as error:  # a result of a worker that is gone
            cause = repr(error)
        if cause:
            self._bury(cause)
        else:
            self._cut_off()
        return None

    def _cut_off(self) -> None:
        """Give up what is being decoded for too long."""
        now, late = time.monotonic(), 0
        for at in range(0, len(self._states), _FIELDS):
            since, job = self._states[at + _DECODING_SINCE], self._job_of(at)
            if since and job is not None and now - since > self._ahead.seconds:
                self._give_up(job, f"decoding took more than data.media_seconds {self._ahead.seconds:g} s")
                with suppress(ProcessLookupError):
                    os.kill(int(self._states[at + _PID]), signal.SIGKILL)  # it may heed nothing else
                late += 1
        if late:
            self._restart()

    def _bury(self, cause: str) -> None:
        """Start again after a worker's death; give up what has killed several."""
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= DEATHS_IN_A_ROW:
            raise self._hopeless(f"ended {DEATHS_IN_A_ROW} times in a row ({cause})")
        time.sleep(LOOK_SECONDS / 4)  # until who is dead is known to be
        for at in range(0, len(self._states), _FIELDS):
            job = self._job_of(at)
            if job is None or not self._states[at + _BUSY] or _is_alive(int(self._states[at + _PID])):
                continue
            self._deaths[job.number] += 1
            if self._deaths[job.number] >= DEATHS_PER_ITEM and isinstance(job.task, MediaTask):
                self._give_up(job, f"decoding ended the process that did it, {DEATHS_PER_ITEM} times")
                self._lost_in_a_row += 1
        if self._lost_in_a_row >= LOST_IN_A_ROW:
            raise self._hopeless(f"ended over {LOST_IN_A_ROW} pictures and clips in a row ({cause})")
        logger.warning("a worker process ended (%s); its task is done again", cause)
        self._restart()

    def _hopeless(self, what: str) -> ReaderError:
        return ReaderError(
            f"data.workers = {self._ahead.workers}: worker processes {what}; give them more memory, or set "
            "data.workers=0"
        )

    def _job_of(self, at: int) -> _Job | None:
        """The job that a worker is at or was last at, unless its result has arrived."""
        number = int(self._states[at + _NUMBER])
        return next((job for job in self._waiting if job.number == number and self._states[at + _PID]), None)

    def _give_up(self, job: _Job, cause: str) -> None:
        assert isinstance(job.task, MediaTask)  # text is not decoded
        self.given_up[job.task.key] = cause

    def _restart(self) -> None:
        """End all workers; the next call starts others."""
        self.restarts += 1
        self._results = None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class _Row:
    """The steps from one on, read ahead by worker processes.

    Attributes:
        next_step: the step that `take` gives.
        workers: do its tasks.
    """

    def __init__(
        self,
        reader: TaskReader,
        tasks: Callable[[int], Sequence[Task]],
        first_step: int,
        end: int | None,
        settings: Ahead,
        known: Mapping[ItemKey, str],
    ) -> None:
        self.next_step, self._tasks, self._steps_ahead = first_step, tasks, settings.steps
        self._stop = Event()
        steps = count(first_step) if end is None else range(first_step, end)
        row = (task for step in steps for task in tasks(step))
        self.workers = _Workers(reader, row, settings, known, self._stop)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read ahead")
        self._steps: deque[Future[StepRead]] = deque()

    def take(self) -> StepRead:
        """The next step, complete; those after it are begun."""
        while len(self._steps) <= self._steps_ahead:
            tasks = len(self._tasks(self.next_step + len(self._steps)))
            self._steps.append(self._thread.submit(self._read, tasks))
        self.next_step += 1
        return self._steps.popleft().result()

    def _read(self, tasks: int) -> StepRead:
        return StepRead.of(self.workers.next() for _ in range(tasks))

    def close(self) -> None:
        """End thread and processes."""
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)
        self.workers.close()


class StepReader:
    """What a rank needs of each step, read ahead.

    Args:
        reader: does tasks.
        tasks: of a step, by its number.
        ahead: how far, and by how many processes; without any, a step is read in this one when it is asked for.
        known: cause by item, of those that are not to be tried.
        steps: that there are; None: no end.
    """

    def __init__(
        self,
        reader: TaskReader,
        tasks: Callable[[int], Sequence[Task]],
        ahead: Ahead,
        known: Mapping[ItemKey, str],
        steps: int | None = None,
    ) -> None:
        self._reader, self._tasks, self._ahead, self._known, self._end = reader, tasks, ahead, known, steps
        self._row: _Row | None = None
        self._restarts = self._retries = 0  # of rows that are closed

    @property
    def restarts(self) -> int:
        """Times that worker processes were started again."""
        return self._restarts + (self._row.workers.restarts if self._row else 0)

    @property
    def retries(self) -> int:
        """Reads of remote storage that were repeated."""
        return self._retries + self._reader.packs.retries + (self._row.workers.retries if self._row else 0)

    @property
    def pids(self) -> list[int]:
        """Of the worker processes that have begun a task."""
        return self._row.workers.pids if self._row else []

    def step(self, step: int) -> StepRead:
        """What was read for a step, counted from 0; steps asked for in a row are read ahead.

        Raises:
            UserError: if text cannot be read, or workers end again and again.
        """
        if not self._ahead.workers:
            return self._reader.step(self._tasks(step), self._known)
        if self._row is None or self._row.next_step != step:
            self.close()
            self._row = _Row(self._reader, self._tasks, step, self._end, self._ahead, self._known)
        return self._row.take()

    def close(self) -> None:
        """End the worker processes."""
        if self._row is not None:
            self._row.close()
            self._restarts += self._row.workers.restarts
            self._retries += self._row.workers.retries
            self._row = None
