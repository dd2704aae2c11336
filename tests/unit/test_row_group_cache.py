"""The node's cache of row groups: read once, bounded, and never in the way when its folder fails."""

from __future__ import annotations

import logging
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_lance.config.errors import UserError
from megatron_lance.config.schema import DataConfig, SourceConfig
from megatron_lance.data import column_file, row_group_cache
from megatron_lance.data.column_file import DamagedFileError
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.prepack import prepack
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.records import RecordReader
from megatron_lance.data.row_group_cache import GroupColumn, RowGroupCache
from megatron_lance.data.row_groups import RowGroups
from tests.tiny import TinyRun

GROUP = 1_200_000
"""Bytes of a group."""
FORK = get_context("fork")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of this size are mapped."""
    monkeypatch.setattr(column_file, "MAPPED_BYTES", GROUP // 2)


def key(number: int, nbytes: int = GROUP) -> GroupColumn:
    return GroupColumn("s3://bucket/a.parquet", 1, "etag 1", number, "image_bytes", ((4, nbytes, nbytes),))


def values(number: int, nbytes: int = GROUP) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([bytes([number]) * (nbytes // 2), b"", None, bytes([number]) * (nbytes // 2)])])


class Storage:
    """Gives groups and counts how often, in a file that processes share."""

    def __init__(self, log: Path, seconds: float = 0.0) -> None:
        self._log, self._seconds = log, seconds
        log.touch()

    def read(self, number: int, nbytes: int = GROUP) -> Callable[[], pa.ChunkedArray]:
        def read() -> pa.ChunkedArray:
            with self._log.open("a") as log:
                log.write(f"{number}\n")
            time.sleep(self._seconds)
            return values(number, nbytes)

        return read

    @property
    def reads(self) -> list[int]:
        return [int(line) for line in self._log.read_text().split()]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "reads")


@pytest.fixture
def cache(tmp_path: Path) -> RowGroupCache:
    """For three groups and a half."""
    return RowGroupCache.open(str(tmp_path / "cache"), 3.5 * GROUP / 1e9)


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def file_of(tmp_path: Path, number: int) -> Path:
    return tmp_path / "cache" / f"{key(number).digest}.row_group"


def mapped(path: Path) -> int:
    """Mappings of files below a folder in this process."""
    return Path("/proc/self/maps").read_text().count(str(path))


def ends(process: Any, code: int = 0) -> None:
    process.join(30)
    assert process.exitcode == code


def test_values_are_those_that_were_read_and_are_read_once(
    cache: RowGroupCache, storage: Storage, tmp_path: Path
) -> None:
    for one in (cache, pickle.loads(pickle.dumps(cache)), RowGroupCache(tmp_path / "cache", 2 * GROUP)):
        assert one.get(key(1), storage.read(1)).equals(values(1))
    assert storage.reads == [1] and names(tmp_path) == [f"{key(1).digest}.row_group"]


@pytest.mark.parametrize(
    "column",
    [
        pa.chunked_array([pa.array(["ab", "", None])]),
        pa.chunked_array([pa.array(["ab"]), pa.array(["c", None])]),
        pa.chunked_array([pa.array([[b"a", b"b"], [], None], pa.list_(pa.binary()))]),
        pa.chunked_array([pa.array(["x"]).dictionary_encode(), pa.array(["y", "x"]).dictionary_encode()]),
        pa.chunked_array([pa.nulls(2)]),
        pa.chunked_array([], pa.binary()),
    ],
    ids=lambda column: str(column.type),
)
def test_columns_of_any_type(cache: RowGroupCache, column: pa.ChunkedArray) -> None:
    for _ in range(2):
        found = cache.get(key(1), lambda: column)
        assert found.to_pylist() == column.to_pylist() and found.type == column.type


def test_what_decides_the_content_decides_the_name() -> None:
    one = key(1)
    changes: list[dict[str, Any]] = [
        *({"path": "s3://other/a.parquet"}, {"size": 2}, {"stamp": "etag 2"}, {"group": 2}),
        *({"column": "caption"}, {"chunks": ((5, GROUP, GROUP),)}),
    ]
    assert len({replace(one, **change).digest for change in changes} | {one.digest}) == len(changes) + 1


def test_processes_that_want_the_same_group_read_it_once(cache: RowGroupCache, tmp_path: Path) -> None:
    slow = Storage(tmp_path / "reads", 0.3)
    copied = pickle.dumps(cache)

    def want(own: RowGroupCache) -> None:
        for number in (1, 2):
            assert own.get(key(number), slow.read(number)).equals(values(number))

    processes = [FORK.Process(target=want, args=(own,)) for own in (cache, cache, cache, pickle.loads(copied))]
    for process in processes:
        process.start()
    for process in processes:
        ends(process)
    assert slow.reads == [1, 2] and len(names(tmp_path)) == 2


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_writer_leaves_nothing_that_is_used(
    cache: RowGroupCache, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(column: pa.ChunkedArray, path: Path) -> None:
        with path.open("r+b") as file:
            file.write(b"x" * (GROUP // 2))
        (tmp_path / "half").touch()
        time.sleep(60)

    writers = []
    for number in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(column_file, "write", half)
            writer = FORK.Process(target=cache.get, args=(key(number), storage.read(number)))
            writer.start()
        _wait_for((tmp_path / "half").exists)
        (tmp_path / "half").unlink()
        writers.append(writer)
    assert all(name.endswith(".partial") for name in names(tmp_path)) and len(names(tmp_path)) == 2
    waiting = FORK.Process(target=cache.get, args=(key(1), storage.read(1)))
    waiting.start()
    for writer in reversed(writers):  # the one who is waited for last
        os.kill(writer.pid or 0, signal.SIGKILL)
        ends(writer, -signal.SIGKILL)
    ends(waiting)
    assert cache.get(key(1), storage.read(1)).equals(values(1))
    assert sorted(storage.reads) == [1, 1, 2]  # the one who waited read it again
    assert names(tmp_path) == [f"{key(1).digest}.row_group"]  # and found the other's partial file without an owner


def test_who_waits_too_long_reads_too(
    cache: RowGroupCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_group_cache, "PATIENCE_SECONDS", 0.1)
    slow = Storage(tmp_path / "reads", 60)
    writer = FORK.Process(target=cache.get, args=(key(1), slow.read(1)))
    writer.start()
    _wait_for(lambda: bool(slow.reads))
    assert cache.get(key(1), lambda: values(1)).equals(values(1))
    assert "another process is reading s3://bucket/a.parquet row group 1 column image_bytes for 0.1 s" in caplog.text
    assert cache.get(key(2), lambda: values(2)).equals(values(2)) and file_of(tmp_path, 2).exists()
    writer.kill()
    writer.join()


def test_the_least_recently_used_leave_and_stay_valid_where_they_are_mapped(
    cache: RowGroupCache, storage: Storage, tmp_path: Path
) -> None:
    (tmp_path / "cache" / f"{'a' * 32}.arrow").write_bytes(bytes(5 * GROUP))
    held = {}
    for number in (1, 2, 3, 1, 4):
        held[number] = cache.get(key(number), storage.read(number))
        os.utime(file_of(tmp_path, number), (len(storage.reads), 10**9 + time.monotonic()))
    assert storage.reads == [1, 2, 3, 4]
    assert set(names(tmp_path)) == {f"{'a' * 32}.arrow", *(f"{key(n).digest}.row_group" for n in (1, 3, 4))}
    assert f"{file_of(tmp_path, 2)} (deleted)" in Path("/proc/self/maps").read_text()
    assert held[2].equals(values(2))
    cache.get(key(2), storage.read(2))
    assert storage.reads == [1, 2, 3, 4, 2] and not file_of(tmp_path, 3).exists()


def test_files_used_before_the_clock_was_set_back_leave_first(
    cache: RowGroupCache, storage: Storage, tmp_path: Path
) -> None:
    for number in (1, 2, 3, 4):
        cache.get(key(number), storage.read(number))
        if number == 2:
            os.utime(file_of(tmp_path, 2), (time.time() + 3600,) * 2)
    assert set(names(tmp_path)) == {f"{key(n).digest}.row_group" for n in (1, 3, 4)}


def test_the_bound_holds_while_several_write(tmp_path: Path) -> None:
    cache = RowGroupCache.open(str(tmp_path / "cache"), 2.5 * GROUP / 1e9)
    slow = Storage(tmp_path / "reads", 0.05)

    def fill(first: int) -> None:
        for number in range(first, first + 4):
            cache.get(key(number), slow.read(number))

    processes = [FORK.Process(target=fill, args=(first,)) for first in (0, 10, 20)]
    for process in processes:
        process.start()
    most = 0
    while any(process.is_alive() for process in processes):
        first, second = on_disk(tmp_path / "cache"), on_disk(tmp_path / "cache")
        most = max(most, sum(first[file] for file in first.keys() & second.keys()))  # these were there together
    for process in processes:
        ends(process)
    assert GROUP < most <= 2.6 * GROUP  # what is reserved but not written takes no room


def on_disk(folder: Path) -> dict[tuple[str, int], int]:
    """Bytes that files take, by row group and inode, as far as they are there when they are looked at."""
    found = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            stat = path.stat()
            found[path.name.split(".")[0], stat.st_ino] = stat.st_blocks * 512
    return found


def test_a_group_beyond_the_bound_is_read_as_without(
    cache: RowGroupCache, storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for told in (4 * GROUP, 10):  # what the data file says of its size may be far off
        for _ in range(2):
            found = cache.get(key(1, told), storage.read(1, 4 * GROUP))
            assert found.equals(values(1, 4 * GROUP))
    assert storage.reads == [1] * 4 and names(tmp_path) == []
    assert caplog.text.count("data.row_group_cache_gb 0.0042 has no room for s3://bucket/a.parquet row group 1") == 1


def test_a_folder_that_fails_is_said_once_and_costs_reads(
    cache: RowGroupCache, storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder was")
    for number in (1, 1, 2):
        assert cache.get(key(number), storage.read(number)).equals(values(number))
    assert storage.reads == [1, 1, 2]
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"data.row_group_cache '{tmp_path / 'cache'}': [Errno 20] Not a directory")
    cache._paused_until = 0.0
    (tmp_path / "cache").unlink()
    cache.get(key(1), storage.read(1))
    assert file_of(tmp_path, 1).exists(), "the folder is back, after a pause it is used again"


def test_a_write_that_fails_half_way(
    cache: RowGroupCache, storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = cache.get(key(9), storage.read(9))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (GROUP // 2, hard))
    try:
        for number in (1, 2, 9):
            assert cache.get(key(number), lambda: values(number)).equals(values(number))  # noqa: B023  # called at once
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before.equals(values(9)) and storage.reads == [9]
    assert names(tmp_path) == [f"{key(9).digest}.row_group"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] and "File too large" in caplog.text


def test_a_full_disk(
    cache: RowGroupCache,
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache.get(key(1), storage.read(1))
    usage = shutil.disk_usage(tmp_path)
    spared = round(3.5 * GROUP)  # by a cache of that bound on a large disk
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=spared + GROUP // 2))
    cache.get(key(2), storage.read(2))  # there is room once the other is gone
    assert names(tmp_path) == [f"{key(2).digest}.row_group"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=spared - 2 * GROUP))
    for number in (3, 4):
        assert cache.get(key(number), storage.read(number)).equals(values(number))
    assert names(tmp_path) == [] and storage.reads == [1, 2, 3, 4]
    full, none = [record.getMessage() for record in caplog.records]
    assert "its disk is full before data.row_group_cache_gb 0.0042 is reached (0.0042 GB are left to others); " in full
    assert "[Errno 28] No space left on device" in none


def test_a_tenth_of_a_small_disk_is_left_to_others(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of /dev/shm, where pixels find no room otherwise."""
    cache, folder, total = RowGroupCache.open(str(tmp_path / "cache"), 64), tmp_path / "cache", 92 * GROUP // 10

    def usage(_: Path) -> shutil._ntuple_diskusage:
        used = sum(file.stat().st_size for file in folder.glob("*.row_group"))
        return shutil._ntuple_diskusage(total, used, total - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    for number in range(12):
        cache.get(key(number), storage.read(number))
    assert total / 10 <= usage(folder).free < total / 10 + 1.1 * GROUP


@pytest.mark.parametrize("damage", ["cut", "begin", "end", "seal", "empty", "offsets"])
def test_a_damaged_file_is_made_again(
    cache: RowGroupCache, storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache.get(key(1), storage.read(1))
    path = file_of(tmp_path, 1)
    content = bytearray(path.read_bytes())
    if damage in ("cut", "empty"):
        del content[{"cut": GROUP - 100, "empty": 0}[damage] :]
    else:
        offsets = content.index(bytes([1] * 64)) - 8  # the last of them, before the values
        content[{"begin": 30, "end": -60, "seal": -5, "offsets": offsets}[damage]] ^= 4
    path.write_bytes(content)
    for _ in range(2):
        assert cache.get(key(1), storage.read(1)).equals(values(1))
    assert storage.reads == [1, 1]
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{path}: is damaged") and warning.endswith("and made again")


def test_every_changed_byte_that_says_where_values_lie_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(column_file, "SEALED_BYTES", 100)
    path, column = tmp_path / "file", pa.chunked_array([pa.array([b"\1" * 200, None, b"\1" * 100])])
    path.write_bytes(bytes(column_file.file_bytes(column)))
    column_file.write(column, path)
    good = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(good):
            if byte == 1 and good[max(at - 64, 0) : at + 64].count(1) > 64:
                continue  # one of the values
            os.pwrite(file.fileno(), bytes([byte ^ 16]), at)
            with pytest.raises(DamagedFileError):
                column_file.read(path)
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert column_file.read(path).equals(column)


def test_errors_of_reading_are_passed_on_and_leave_no_lock(
    cache: RowGroupCache, storage: Storage, tmp_path: Path
) -> None:
    def fail() -> pa.ChunkedArray:
        raise ConnectionResetError("storage is gone")

    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            cache.get(key(1), fail)
    assert names(tmp_path) == []
    assert cache.get(key(1), storage.read(1)).equals(values(1))


class Rows(NamedTuple):
    """A parquet file of three row groups of two pictures, and what they hold."""

    folder: Path
    media: list[bytes]

    def reader(self, cache: RowGroupCache | None, kept_bytes: int = 1) -> RecordReader:
        return RecordReader(SourceConfig("src", str(self.folder), "t2i"), kept_bytes, cache)


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return Rows(tmp_path / "data", _write_rows(tmp_path / "data", 0))


def _write_rows(folder: Path, offset: int) -> list[bytes]:
    folder.mkdir(exist_ok=True)
    media = [bytes([offset + number]) * (GROUP // 2) for number in range(6)]
    table = pa.table({"caption": [f"row {number}" for number in range(6)], "image_bytes": media})
    pq.write_table(table, folder / "a.parquet", row_group_size=2, compression="none", use_dictionary=False)
    return media


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, str]]]:
    """(row group, column) of each read of a file."""
    reads: list[tuple[int, str]] = []
    read_column = RowGroups._read_column

    def count(self: RowGroups, file: str, group: int, column: str) -> pa.ChunkedArray:
        reads.append((group, column))
        return read_column(self, file, group, column)

    monkeypatch.setattr(RowGroups, "_read_column", count)
    yield reads


def test_records_are_the_same_with_and_without(
    rows: Rows, cache: RowGroupCache, counted: list[tuple[int, str]]
) -> None:
    first = rows.reader(cache)
    for reader in (rows.reader(None), first, pickle.loads(pickle.dumps(first)), rows.reader(cache)):
        for row in (0, 4, 1, 5):
            assert reader.media("a.parquet", row, "image_bytes") == rows.media[row]
            assert reader.record("a.parquet", row).inputs == (f"row {row}",)
    without, shared = counted[:8], counted[8:]
    assert len(without) == 8  # a process that keeps one group reads it for every row
    assert sorted(shared) == [(0, "caption"), (0, "image_bytes"), (2, "caption"), (2, "image_bytes")]


def test_a_data_file_that_was_written_anew_is_read_anew(rows: Rows, cache: RowGroupCache) -> None:
    assert rows.reader(cache).media("a.parquet", 0, "image_bytes") == rows.media[0]
    path = rows.folder / "a.parquet"
    size, later = path.stat().st_size, path.stat().st_mtime + 5
    media = _write_rows(rows.folder, 100)
    os.utime(path, (later, later))
    assert path.stat().st_size == size
    assert rows.reader(cache).media("a.parquet", 0, "image_bytes") == media[0]


@pytest.mark.parametrize("kept_bytes", [1, GROUP, 10 * GROUP])
def test_rows_read_in_order_read_each_column_once(rows: Rows, counted: list[tuple[int, str]], kept_bytes: int) -> None:
    """As planning does, however large the row groups are."""
    reader = rows.reader(None, kept_bytes)
    for row in range(6):
        assert reader.record("a.parquet", row).inputs == (f"row {row}",)
        assert reader.media("a.parquet", row, "image_bytes") == rows.media[row]
    assert counted == [(group, column) for group in range(3) for column in ("caption", "image_bytes")]
    assert len(reader._groups._columns._values) == (6 if kept_bytes > 5 * GROUP else 2)


def test_a_process_maps_no_more_than_it_keeps(rows: Rows, tmp_path: Path) -> None:
    cache = RowGroupCache.open(str(tmp_path / "cache"), 1.5 * GROUP / 1e9)  # holds one group
    reader = rows.reader(cache, kept_bytes=round(2.5 * GROUP))
    counts = []
    for row in (0, 2, 4, 0, 2, 4):
        assert reader.media("a.parquet", row, "image_bytes") == rows.media[row]
        counts.append(mapped(tmp_path / "cache"))
    assert counts == [1, 2, 2, 2, 2, 2]  # most of them unlinked
    assert len(names(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"^data.row_group_cache '{folder}': cannot be written \(.+\); name a fol"):
            RowGroupCache.open(str(folder), 1.0)


def test_a_folder_on_a_network_file_system_is_an_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fcntl.flock", lambda *_: None)  # as on NFS, where a process may lock a file twice
    with pytest.raises(UserError, match=r"': has the locks of a network file system; name a folder on a disk of this"):
        RowGroupCache.open(str(tmp_path), 1.0)
    assert not list(tmp_path.iterdir())


def test_files_of_another_user_are_used(
    cache: RowGroupCache, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.get(key(1), storage.read(1))

    def refuse(_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.get(key(1), storage.read(1)).equals(values(1)) and storage.reads == [1]


def _with_cache(tiny_run: TinyRun, folder: Path) -> DataConfig:
    return tiny_run.load(f"data.row_group_cache={folder}", "data.row_group_cache_gb=0.1").data


def test_packs_are_read_through_it_and_do_not_depend_on_it(
    tiny_run: TinyRun, tmp_path: Path, counted: list[tuple[int, str]]
) -> None:
    plain, config = tiny_run.load().data, _with_cache(tiny_run, tmp_path / "cache")
    index, tokenizer = PackIndex.open(plain.pack_index), Tokenizer(plain.tokenizer)
    readers = [PackReader(data, index, tokenizer) for data in (plain, config, config)]
    for number in range(len(index)):
        media = index.pack(number).media
        without, *others = (reader.requests(number, media) for reader in readers)
        assert all(requests == without for requests in others)
        assert all(r.tokens(number).token_ids.equal(readers[0].tokens(number).token_ids) for r in readers[1:])
    assert len(counted) == 2 * len(names(tmp_path))  # the reader without a cache, and one of the two with it
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.row_group_cache '.*file': cannot be written"):
        PackReader(replace(config, row_group_cache=str(tmp_path / "file")), index, tokenizer)


def test_planning_does_not_fill_it(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tiny_run.load(f"data.row_group_cache={tmp_path / 'cache'}", f"data.pack_index={tmp_path / 'index'}")
    index = prepack(run.data, run.model, run.training.seed, run.training.global_batch_size, progress=False)
    assert not (tmp_path / "cache").exists()
    assert index.hash == PackIndex.open(tiny_run.load().data.pack_index).hash
