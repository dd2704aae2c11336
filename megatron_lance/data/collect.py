"""Collecting facts: every data file is probed once, by several processes, and remembered.

Station: sources -> [collect] -> facts of each file -> prepack.  In: the files of the sources.  Out: a facts file for
each, in a folder that is kept between runs.  The name of a facts file is a digest of what decides its content: size,
change stamp and footer of the data file, task, prompts, tokenizer.  So a new shard costs itself, and another budget,
mixture, resolution or seed costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from tqdm import tqdm

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import PromptConfig, SourceConfig
from megatron_lance.data.facts import FILE_SCHEMA, FileFacts, facts_table
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.records import DataSetError, Footer, RecordReader, SourceFile

logger = logging.getLogger(__name__)

_VERSION = 2
"""Raised whenever a row would give other facts."""
_ROWS = 2048
"""Rows of a job."""
_READS_AT_ONCE = 32
"""Footers asked for at a time."""

FileKey = tuple[int, str]
"""Number of a source, and name of a file of it."""


@dataclass(frozen=True)
class Inquiry:
    """What facts depend on besides the data; a worker process is told it once.

    Attributes:
        sources: all of them.
        prompts: system prompts.
        tokenizer: folder.
        folder: where facts files are kept.
    """

    sources: tuple[SourceConfig, ...]
    prompts: PromptConfig
    tokenizer: str
    folder: Path


class _Job(NamedTuple):
    """Some rows of a file."""

    source: int
    file: str
    start: int
    stop: int


def facts_path(inquiry: Inquiry, tokenizer: Tokenizer, source: SourceConfig, file: SourceFile, footer: Footer) -> Path:
    """Where the facts of a data file lie."""
    content = {
        **{"version": _VERSION, "source": source.name, "task": source.task, "raw": source.raw_bytes_input},
        **{"file": file.name, "size": file.size, "stamp": file.stamp, "footer": footer.sha256},
        **{"prompts": asdict(inquiry.prompts), "tokenizer": tokenizer.sha256},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    return inquiry.folder / f"{digest}.arrow"


def read_footers(readers: Sequence[RecordReader], progress: bool) -> dict[FileKey, Footer]:
    """What every file says of itself; many are asked at a time, since storage that is far away answers late.

    Not of file systems that threads may not share: those are asked in turn.

    Args:
        readers: of the sources, in order.
        progress: draw a progress bar on stderr.

    Raises:
        DataSetError: for the first file that cannot be read or lacks columns.
    """
    keys = [(number, file.name) for number, reader in enumerate(readers) for file in reader.files]

    def ask(key: FileKey) -> Footer:
        return readers[key[0]].footer(key[1])

    def shared(key: FileKey) -> bool:
        return readers[key[0]].threads_may_share

    bar = tqdm(keys, "footers", unit="file", disable=not progress)
    with bar as every, ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        answers = pool.map(ask, filter(shared, keys))
        return {key: next(answers) if shared(key) else ask(key) for key in every}


def collect(
    inquiry: Inquiry,
    tokenizer: Tokenizer,
    readers: Sequence[RecordReader],
    footers: Mapping[FileKey, Footer],
    workers: int,
    progress: bool,
) -> dict[FileKey, Path]:
    """Make sure that every file has its facts.

    Args:
        inquiry: what to find out.
        tokenizer: of its folder.
        readers: of its sources, in order.
        footers: of their files.
        workers: processes; 1: this one.
        progress: draw a progress bar on stderr.

    Returns:
        The facts file of each (number of a source, file).

    Raises:
        DataSetError: if a data file cannot be read, or kills the process that reads it.
        UserError: if the folder cannot be made.
    """
    try:
        inquiry.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"data.facts '{inquiry.folder}': cannot be written ({error.strerror}); name another folder"
        ) from error
    paths: dict[FileKey, Path] = {}
    jobs: list[_Job] = []
    for number, reader in enumerate(readers):
        for file in reader.files:
            footer = footers[number, file.name]
            rows = footer.rows
            path = paths[number, file.name] = facts_path(inquiry, tokenizer, reader.source, file, footer)
            if not _is_whole(path, rows):
                starts = range(0, max(rows, 1), _ROWS)
                jobs += [_Job(number, file.name, start, min(start + _ROWS, rows)) for start in starts]
    total = sum(job.stop - job.start for job in jobs)
    known = len(paths) - len({(job.source, job.file) for job in jobs})
    logger.info("facts of %d of %d files are known; %d rows to probe", known, len(paths), total)
    found: dict[FileKey, dict[int, pa.RecordBatch]] = {}
    missing = {key: 0 for key in ((job.source, job.file) for job in jobs)}
    for job in jobs:
        missing[job.source, job.file] += 1
    with tqdm(total=total, desc="probe", unit="row", disable=not (progress and jobs)) as bar:
        for job, batch in _work(inquiry, tokenizer, readers, jobs, workers):
            key = job.source, job.file
            found.setdefault(key, {})[job.start] = batch
            bar.update(batch.num_rows)
            if len(found[key]) == missing[key]:
                _write(paths[key], [batch for _, batch in sorted(found.pop(key).items())])
    return paths


def _is_whole(path: Path, rows: int) -> bool:
    """Whether there is a good facts file; one that is damaged or lacks rows that could not be read is made again."""
    if not path.is_file():
        return False
    try:
        facts = FileFacts(path)
        return len(facts) == rows and facts.all_reached
    except (OSError, pa.ArrowException) as error:
        logger.warning("%s is damaged (%s) and made again", path, error)
        return False


def _write(path: Path, batches: list[pa.RecordBatch]) -> None:
    """One record batch; the file appears complete or not at all."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    table = pa.Table.from_batches(batches, FILE_SCHEMA).combine_chunks()
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, FILE_SCHEMA) as writer:
        writer.write_table(table)
    partial.rename(path)


def _work(
    inquiry: Inquiry, tokenizer: Tokenizer, readers: Sequence[RecordReader], jobs: list[_Job], workers: int
) -> Iterator[tuple[_Job, pa.RecordBatch]]:
    """Do the jobs, in any order, few of them in this process; only a few results wait at a time."""
    if workers == 1 or sum(job.stop - job.start for job in jobs) <= _ROWS:
        for job in jobs:
            rows = range(job.start, job.stop)
            yield job, facts_table(readers[job.source], job.file, rows, inquiry.prompts, tokenizer)
        return
    waiting = iter(jobs)
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        running: dict[Future[pa.RecordBatch], _Job] = {}
        while True:
            for job in islice(waiting, 4 * workers - len(running)):
                running[pool.submit(_do, inquiry, job)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running[future]
                try:
                    batch = future.result()
                except BrokenProcessPool as error:
                    names = sorted({f"{inquiry.sources[j.source].name}/{j.file}" for j in running.values()})
                    raise DataSetError(
                        f"data.sources: a process died while it probed {', '.join(names)}; run again with --workers 1 "
                        "to see the cause, or leave the file out"
                    ) from error
                del running[future]
                yield job, batch


def _do(inquiry: Inquiry, job: _Job) -> pa.RecordBatch:
    """The facts of a job's rows, in a process of its own."""
    reader, tokenizer = _reader(inquiry.sources[job.source]), _tokenizer(inquiry.tokenizer)
    return facts_table(reader, job.file, range(job.start, job.stop), inquiry.prompts, tokenizer)


@lru_cache(maxsize=2)  # each holds row groups; jobs come source by source
def _reader(source: SourceConfig) -> RecordReader:
    return RecordReader(source)


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer(folder)
