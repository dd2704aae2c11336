"""Reading ahead in worker processes: the same bits as without, whatever befalls the workers."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lance.data.background import Ahead, ReaderError, StepReader
from megatron_lance.data.decode import MediaReader, ReadMedia
from megatron_lance.data.loader import PackReader
from megatron_lance.data.pack_index import PackIndex
from megatron_lance.data.pack_index_format import PackIndexError
from megatron_lance.data.prompt import Tokenizer
from megatron_lance.data.reading import StepRead, TaskReader
from megatron_lance.data.shares import Task, rank_tasks
from tests.fateful import FatefulReader, NoRoomReader, UnbornReader
from tests.shared import REPOSITORY
from tests.tiny import TinyRun, jpeg

BATCH = 2
STEPS = 4
AHEAD = Ahead(workers=2, steps=1, seconds=300.0)  # nothing here takes so long, on a busy machine either


class Data:
    """The tiny data set, read."""

    def __init__(self, run: TinyRun, *overrides: str) -> None:
        self.run = run.load(*overrides)
        self.index = PackIndex.open(self.run.data.pack_index)
        self.packs = PackReader(self.run.data, self.index, Tokenizer(self.run.data.tokenizer))

    def tasks(self, step: int) -> list[Task]:
        return rank_tasks([self.index.pack(n) for n in self.index.global_batch(step, BATCH)], 1, 0)

    def reader(self, ahead: Ahead, media: MediaReader | None = None) -> StepReader:
        return StepReader(TaskReader(self.packs, media or MediaReader("host", 1)), self.tasks, ahead, {})


@pytest.fixture(scope="module")
def data(tiny_run: TinyRun) -> Data:
    return Data(tiny_run)


@pytest.fixture(scope="module")
def expected(data: Data) -> list[StepRead]:
    reader = data.reader(replace(AHEAD, workers=0))
    return [reader.step(step) for step in range(STEPS)]


def causes(read: StepRead) -> dict[tuple[str, int], str]:
    """What is wrong with media, by file and row."""
    return {(item.file, item.row): str(one) for (_, item), one in read.media.items() if isinstance(one, ValueError)}


def assert_equal(ours: StepRead, theirs: StepRead, but: Sequence[tuple[str, int]] = ()) -> None:
    """The same tokens and pixels, leaving out some rows by file and row."""
    assert ours.tokens.keys() == theirs.tokens.keys() and ours.media.keys() == theirs.media.keys()
    for number, tokens in ours.tokens.items():
        assert torch.equal(tokens.token_ids, theirs.tokens[number].token_ids)
        assert torch.equal(tokens.ce_labels, theirs.tokens[number].ce_labels)
    for (number, item), one in ours.media.items():
        if (item.file, item.row) not in but:
            other = theirs.media[number, item]
            assert isinstance(one, ReadMedia) and isinstance(other, ReadMedia)
            assert torch.equal(one.data, other.data) and one.normalize == other.normalize


def test_workers_give_the_same_bits_in_any_order_of_steps(data: Data, expected: list[StepRead]) -> None:
    reader = data.reader(AHEAD)
    for step in (0, 1, 3, 1):  # in a row, then elsewhere, as after a restart
        assert_equal(reader.step(step), expected[step])
    pids = reader.pids
    reader.close()
    assert len(set(pids)) == 2 and os.getpid() not in pids
    assert_gone(pids)
    assert (reader.restarts, reader.retries) == (0, 0)
    assert len(set(resource.getrlimit(resource.RLIMIT_NOFILE))) == 1, "a tensor that waits is an open file"


def assert_gone(pids: Sequence[int]) -> None:
    """The processes end within half a minute."""
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            for _ in range(300):
                os.kill(pid, 0)
                time.sleep(0.1)


def test_workers_end_with_a_rank_that_is_killed(tiny_run: TinyRun) -> None:
    command = [sys.executable, "-m", "tests.killed_reader", str(tiny_run.folder)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    assert_gone(pids)


def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    data: Data, expected: list[StepRead], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = data.reader(AHEAD, FatefulReader("die once", jpeg("green"), tmp_path / "mark"))
    for step in range(STEPS):
        assert_equal(reader.step(step), expected[step])
    reader.close()
    assert (tmp_path / "mark").exists()
    assert reader.restarts == 1 and caplog.text.count("a worker process ended") == 1


def test_a_picture_that_ends_its_worker_is_given_up(data: Data, expected: list[StepRead], tmp_path: Path) -> None:
    reader = data.reader(AHEAD, FatefulReader("die", jpeg("green"), tmp_path / "mark"))
    steps = [reader.step(step) for step in range(STEPS)]
    reader.close()
    rows = (("text2image.parquet", 1), ("x2t_image.parquet", 1))
    found = {row: cause for read in steps for row, cause in causes(read).items()}
    assert set(found) == set(rows)
    assert set(found.values()) == {"decoding ended the process that did it, 2 times"}
    for read, other in zip(steps, expected, strict=True):
        assert_equal(read, other, but=rows)
    assert 2 <= reader.restarts <= 4  # the two may end their workers together


def test_a_picture_whose_decoding_hangs_is_given_up(data: Data, expected: list[StepRead], tmp_path: Path) -> None:
    hanging = replace(AHEAD, seconds=5.0)
    reader = data.reader(hanging, FatefulReader("hang", jpeg("green"), tmp_path / "mark"))
    rows = (("text2image.parquet", 1), ("x2t_image.parquet", 1))
    step = next(s for s, read in enumerate(expected) if any((i.file, i.row) == rows[0] for _, i in read.media))
    start = time.monotonic()
    read = reader.step(step)
    assert 5 <= time.monotonic() - start
    assert causes(read)[rows[0]] == "decoding took more than data.media_seconds 5 s"
    assert_equal(read, expected[step], but=rows)
    reader.close()


def test_an_error_of_a_text_is_raised_as_it_is(tiny_run: TinyRun, tmp_path: Path) -> None:
    name = "x2t_image.parquet"
    content = (tiny_run.folder / "data" / name).read_bytes()
    (tmp_path / name).write_bytes(content.replace(b"Which colour has", b"WHICH COLOUR HAS"))  # as long, other tokens
    reader = Data(tiny_run, f"data.sources.2.path={tmp_path / name}").reader(AHEAD)
    with pytest.raises(PackIndexError, match=r"^record x2t_image\S+: now gives .* run tools/prepack.py --force$"):
        for step in range(STEPS):
            reader.step(step)
    reader.close()


@pytest.mark.parametrize("kind", ["TextTask", "MediaTask"])
def test_a_full_shared_memory_is_said(data: Data, tmp_path: Path, kind: str) -> None:
    """No result gets lost on its way, for which a rank would wait for ever."""
    reader = data.reader(AHEAD, NoRoomReader(kind))
    with pytest.raises(
        ReaderError, match=r"no room in shared memory \(No space left on device\); make /dev/shm larger"
    ):
        reader.step(0)
    reader.close()


def test_not_every_picture_is_given_up(data: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where all end their workers it is not the pictures."""
    monkeypatch.setattr("megatron_lance.data.background.LOST_IN_A_ROW", 2)
    reader = data.reader(AHEAD, FatefulReader("die at all", b"", tmp_path / "mark"))
    with pytest.raises(
        ReaderError, match=r"data.workers = 2: worker processes ended over 2 pictures and clips in a row"
    ):
        for step in range(STEPS):
            reader.step(step)
    reader.close()


def test_workers_that_cannot_live_are_not_started_for_ever(data: Data) -> None:
    reader = data.reader(AHEAD, UnbornReader("host", 1))
    with pytest.raises(ReaderError, match=r"data.workers = 2: worker processes ended 5 times in a row .*workers=0"):
        reader.step(0)
    reader.close()
