"""Remote storage that fails for a moment, or for good."""

from __future__ import annotations

import errno
import gc
import io
import pickle
import threading
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from megatron_lance.config.schema import SourceConfig
from megatron_lance.data.collect import read_footers
from megatron_lance.data.records import DataSetError, Footer, RecordError, RecordReader
from megatron_lance.data.remote import ATTEMPTS, PatientReads, is_local
from megatron_lance.profiling.benchmarks.counted_files import CountedFileSystem


def _file(table: pa.Table) -> bytes:
    """A parquet file of a table."""
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


GOOD = _file(pa.table({"caption": ["a cat"], "image_bytes": [b"x"]}))


class Moody(MemoryFileSystem):
    """A memory file system of its own that fails as often as `failures` says."""

    protocol = "moody"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    failures = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("moody://").strip("/")

    def _fail(self) -> None:
        if Moody.failures:
            Moody.failures -= 1
            raise ConnectionResetError(104, "Connection reset by peer")

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._fail()
        return super()._open(path, *args, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self._fail()
        return bytes(super().cat_file(path, *args, **kwargs))


fsspec.register_implementation("moody", Moody, clobber=True)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits."""
    monkeypatch.setattr("megatron_lance.data.remote.FIRST_WAIT", 0.001)


@pytest.fixture
def rows() -> RecordReader:
    """A data set of references to media beside it."""
    fs, Moody.failures = Moody(), 0
    file = _file(pa.table({"caption": ["a cat", "a dog"], "image_bytes": ["cat.png", "lost.png"]}))
    fs.pipe({"/set/a.parquet": file, "/set/cat.png": b"pixels of a cat"})
    return RecordReader(SourceConfig("pets", "moody://set", "t2i", raw_bytes_input=False))


def test_reads_that_fail_for_a_moment_are_repeated(rows: RecordReader, caplog: pytest.LogCaptureFixture) -> None:
    Moody.failures = 2
    assert rows.record("a.parquet", 0).inputs == ("a cat",)
    assert rows.retries == 2
    assert "/set/a.parquet: [Errno 104] Connection reset by peer; attempt 3 of 5 follows" in caplog.text
    Moody.failures = ATTEMPTS - 1
    assert rows.media("a.parquet", 0, "image_bytes") == b"pixels of a cat"
    assert rows.retries == ATTEMPTS + 1
    assert pickle.loads(pickle.dumps(rows)).retries == 0


def test_a_column_is_read_from_a_file_opened_anew(rows: RecordReader, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rows._groups.parquet("a.parquet")

    def lost(*args: Any, **kwargs: Any) -> Any:
        raise OSError("connection lost")

    monkeypatch.setattr(first, "read_row_group", lost)
    assert rows.record("a.parquet", 1).inputs == ("a dog",)
    assert rows.retries == 1 and rows._groups.parquet("a.parquet") is not first


def test_what_lasts_is_said_after_some_attempts_or_at_once(rows: RecordReader) -> None:
    with pytest.raises(RecordError, match=r"'lost.png' cannot be read"):
        rows.media("a.parquet", 1, "image_bytes")
    assert rows.retries == 0  # a file that is not there will not come
    Moody.failures = 99
    with pytest.raises(RecordError, match=r"'cat.png' cannot be read .*Connection reset"):
        rows.media("a.parquet", 0, "image_bytes")
    assert rows.retries == ATTEMPTS - 1
    with pytest.raises(DataSetError, match=r"a.parquet: is not a readable parquet file .*Connection reset"):
        RecordReader(rows.source).footer("a.parquet")


def test_of_an_object_store_no_more_is_asked_for_than_is_wanted(tmp_path: Path) -> None:
    """Where fsspec's buffered files read megabytes ahead."""
    media = [bytes([number]) * 1_000_000 for number in range(6)]
    table = pa.table({"caption": ["a"] * 6, "image_bytes": media})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1, compression="none", use_dictionary=False)
    storage = fsspec.filesystem(CountedFileSystem.protocol)
    reader = RecordReader(SourceConfig("a", f"counted://{tmp_path}", "t2i"))
    assert reader.record("a.parquet", 0).inputs == ("a",)  # opens the file
    before = storage.bytes_read
    assert [reader.media("a.parquet", row, "image_bytes") for row in (4, 1)] == [media[4], media[1]]
    assert 2_000_000 <= storage.bytes_read - before < 2_010_000
    with storage.open(f"{tmp_path}/a.parquet") as file:
        before = storage.bytes_read
        assert file.read(10) and storage.bytes_read - before > 5_000_000


def test_a_footer_is_one_read(tmp_path: Path) -> None:
    table = pa.table({"caption": ["a"] * 5, "image_bytes": [b"x" * 100_000] * 5})
    pq.write_table(table, tmp_path / "long.parquet", row_group_size=2, compression="none")
    wide = {f"column_{number}": ["a"] for number in range(1_000)}
    pq.write_table(pa.table({"caption": ["a"], "image_bytes": [b"x"], **wide}), tmp_path / "wide.parquet")
    storage = fsspec.filesystem(CountedFileSystem.protocol)
    reader, reads = RecordReader(SourceConfig("a", f"counted://{tmp_path}", "t2i")), storage.reads
    long, wide_one = (reader.footer(f"{name}.parquet") for name in ("long", "wide"))
    assert long.group_rows == (2, 2, 1) and wide_one.group_rows == (1,) and long.sha256 != wide_one.sha256
    assert storage.reads - reads == 1 + 2  # the wide one's is longer than what is asked for at first


def test_a_damaged_file_is_not_read_as_a_footer(tmp_path: Path) -> None:
    """Four bytes before the end of anything are a length."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(1_000_000) + (900_000).to_bytes(4, "little") + b"junk")
    storage = fsspec.filesystem(CountedFileSystem.protocol)
    reader, read = RecordReader(SourceConfig("a", f"counted://{tmp_path}", "t2i")), storage.bytes_read
    with pytest.raises(DataSetError, match=r"a.parquet: is not a readable parquet file"):
        reader.footer("a.parquet")
    assert storage.bytes_read - read <= 1 << 16


def test_footers_are_asked_for_together_where_threads_may_share_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        (tmp_path / f"{number}.parquet").write_bytes(GOOD)
        (tmp_path / f"alone{number}").mkdir()
        (tmp_path / f"alone{number}" / "a.parquet").write_bytes(GOOD)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for number in range(8):
            archive.write(tmp_path / f"{number}.parquet", f"{number}.parquet")
    together, footer = threading.Barrier(8), RecordReader.footer
    threads: set[int] = set()

    def at_once(self: RecordReader, file: str) -> Footer:
        together.wait(30)  # an error where one file is asked for after another
        return footer(self, file)

    def in_turn(self: RecordReader, file: str) -> Footer:
        threads.add(threading.get_ident())
        return footer(self, file)

    for path, one, shared in (
        (f"{tmp_path}/?.parquet", at_once, True),
        (f"zip://*.parquet::{tmp_path}/all.zip", in_turn, False),
    ):
        monkeypatch.setattr(RecordReader, "footer", one)
        reader = RecordReader(SourceConfig("a", path, "t2i"))
        assert reader.threads_may_share == shared
        footers = read_footers([reader], progress=False)
        assert [footers[0, f"{number}.parquet"].rows for number in range(8)] == [1] * 8
    assert len(threads) == 1
    monkeypatch.setattr(RecordReader, "footer", at_once)  # of sources of a file each, too
    alone = [RecordReader(SourceConfig(str(number), f"{tmp_path}/alone{number}", "t2i")) for number in range(8)]
    assert list(read_footers(alone, progress=False)) == [(number, "a.parquet") for number in range(8)]


def test_the_first_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for number in range(99):
        (tmp_path / f"{number:02}.parquet").write_bytes(b"PAR1 cut short" if number in (41, 77) else GOOD)
    with pytest.raises(DataSetError, match=r"41.parquet: is not a readable parquet file"):
        read_footers([RecordReader(SourceConfig("a", str(tmp_path), "t2i"))], progress=False)


def test_open_files_keep_nothing_of_what_was_read(tmp_path: Path) -> None:
    for number in range(6):
        table = pa.table({"caption": ["a"], "image_bytes": [bytes([number]) * 1_000_000]})
        pq.write_table(table, tmp_path / f"{number}.parquet", compression="none", use_dictionary=False)
    reader = RecordReader(SourceConfig("a", f"counted://{tmp_path}", "t2i"), cache_bytes=1)
    assert all(reader.record(file.name, 0).inputs == ("a",) for file in reader.files)
    tracemalloc.start()
    try:
        for file in reader.files:
            assert len(reader.media(file.name, 0, "image_bytes")) == 1_000_000
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_version_is_known_of_file_systems_with_hashes_only(tmp_path: Path) -> None:
    stamps: set[str] = set()
    for caption in ("one", "two"):
        table, archive = tmp_path / "a.parquet", tmp_path / f"{caption}.zip"
        pq.write_table(pa.table({"caption": [caption], "image_bytes": [b"x"]}), table)
        with zipfile.ZipFile(archive, "w") as file:
            file.write(table, "a.parquet")
        reader = RecordReader(SourceConfig("a", f"zip://*.parquet::{archive}", "t2i"))
        stamps.update(file.stamp for file in reader.files)
    assert len(stamps) == 2 and all(stamp.startswith("CRC ") for stamp in stamps)


class Terse(MemoryFileSystem):
    """Its lists tell no sizes, as those of http."""

    protocol = "terse"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    told = True

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("terse://").strip("/")

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return {name: info | {"size": None} for name, info in super().find(path, *args, **kwargs).items()}

    def info(self, path: str, **kwargs: Any) -> Any:
        return super().info(path, **kwargs) | ({} if self.told else {"size": None})


def test_sizes_that_a_list_does_not_tell_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("terse", Terse, clobber=True)
    fsspec.filesystem("terse").pipe("/set/a.parquet", b"12345")
    source = SourceConfig("a", "terse://set", "t2i")
    assert [file.size for file in RecordReader(source).files] == [5]
    monkeypatch.setattr(Terse, "told", False)
    with pytest.raises(DataSetError, match=r"cannot be listed \(the size of /set/a.parquet is not told\)"):
        RecordReader(source)


def test_waits_double(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)

    def fail() -> None:
        raise TimeoutError("no answer")

    with pytest.raises(TimeoutError, match="no answer"):
        PatientReads(0.5)("x", fail)
    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_errors_of_this_machines_files_last_but_for_those_of_a_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_local(LocalFileSystem()) and not is_local(Moody())
    pq.write_table(pa.table({"caption": ["a cat"], "image_bytes": ["cat.png"]}), tmp_path / "a.parquet")
    (tmp_path / "cat.png").write_bytes(b"pixels")
    rows = RecordReader(SourceConfig("pets", str(tmp_path), "t2i", raw_bytes_input=False))
    errors = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]
    cat_file = LocalFileSystem.cat_file

    def stale(self: LocalFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        if errors:
            raise errors.pop()
        return cat_file(self, path, *args, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "cat_file", stale)
    assert rows.media("a.parquet", 0, "image_bytes") == b"pixels" and rows.retries == 2
    errors += [OSError(errno.EINVAL, "Invalid argument")]
    with pytest.raises(RecordError, match="Invalid argument"):
        rows.media("a.parquet", 0, "image_bytes")
    assert rows.retries == 2


def test_processes_may_share_a_copy_on_a_local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"caption": ["a", "b"], "image_bytes": [b"1", b"2"]}), tmp_path / "a.parquet")
    # What FSSPEC_FILECACHE_CACHE_STORAGE=FOLDER in the environment sets.
    monkeypatch.setitem(fsspec.config.conf, "filecache", {"cache_storage": str(tmp_path / "copy")})
    source = SourceConfig("a", f"filecache::file://{tmp_path}/a.parquet", "t2i")
    reader, later = RecordReader(source), RecordReader(source)
    assert not reader.threads_may_share
    assert reader.media("a.parquet", 1, "image_bytes") == b"2"
    (tmp_path / "a.parquet").unlink()
    assert later.media("a.parquet", 0, "image_bytes") == b"1"
