"""Records: every schema, bytes and paths, errors that name file and remedy."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megatron_lance.config.schema import SourceConfig
from megatron_lance.data.media import probe
from megatron_lance.data.records import DataSetError, Media, RecordError, RecordReader
from tests.shared import shared_path

REAL = {
    "text2image": ("t2i", 1, "image"),
    "text2video": ("t2v", 1, "video"),
    "image2image": ("i_edit", 2, "image"),
    "video2video": ("v_edit", 2, "video"),
    "x2t_image": ("i2t", 1, "image"),
    "x2t_video": ("v2t", 1, "video"),
}


def reader(path: Path | str, task: str, raw_bytes_input: bool = True) -> RecordReader:
    return RecordReader(SourceConfig("src", str(path), task, raw_bytes_input=raw_bytes_input))


def png(color: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", REAL)
def test_real_files_of_each_schema(name: str) -> None:
    task, n_media, kind = REAL[name]
    rows = reader(shared_path("data", f"{name}.parquet"), task)
    table = pq.read_table(shared_path("data", f"{name}.parquet")).to_pylist()
    [file] = rows.files
    assert rows.footer(file.name).rows == len(table)
    for row, expected in reversed(list(enumerate(table))):
        record = rows.record(file.name, row)
        assert record.sample_id == f"src/{name}.parquet/{row}"
        media = [m for m in (*record.inputs, record.target) if isinstance(m, Media)]
        assert len(media) == n_media
        for m in media:
            content = rows.media(file.name, row, m.element)
            assert content == expected[m.element]
            assert probe(content).kind == m.kind == kind
        texts = [t for t in (*record.inputs, record.target, record.system) if isinstance(t, str) and t]
        assert sorted(texts) == sorted(v for v in expected.values() if isinstance(v, str) and v)


def test_real_interleaved_file() -> None:
    path = shared_path("data", "interleave_subject.parquet")
    rows = reader(path, "s2i")
    record = rows.record("interleave_subject.parquet", 1)
    assert record.inputs == (
        Media("image", "0"),
        Media("image", "1"),
        "Put the animal of the first picture into the scene of the second.",
    )
    assert record.target == Media("image", "3")
    arrays = pq.read_table(path)["interleave_array"][1].as_py()
    assert [rows.media("interleave_subject.parquet", 1, i) for i in "013"] == [arrays[0], arrays[1], arrays[3]]


def test_text_only_rows(tmp_path: Path) -> None:
    table = {"caption_i": ["Be brief.", None], "caption_q": ["Why?", "Who?"], "caption_a": ["So.", "I."]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    rows = reader(tmp_path / "a.parquet", "t2t")
    record = rows.record("a.parquet", 0)
    assert (record.system, record.inputs, record.target) == ("Be brief.", ("Why?",), "So.")
    assert rows.record("a.parquet", 1).system == ""


def test_interleaved_understanding_has_a_text_target(tmp_path: Path) -> None:
    arrays = [[png("red"), b"vs", png("blue"), "wärmer?".encode()]]
    kinds = [["image", "text", "image", "text"]]
    pq.write_table(pa.table({"interleave_array": arrays, "element_dtype_array": kinds}), tmp_path / "a.parquet")
    record = reader(tmp_path, "i2t").record("a.parquet", 0)
    assert record.inputs == (Media("image", "0"), "vs", Media("image", "2"))
    assert record.target == "wärmer?"


def test_folder_glob_and_url_list_the_same_files(tmp_path: Path) -> None:
    for name in ("b.parquet", "sub/a.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"caption": [name], "image_bytes": [png("red")]}), tmp_path / name)
    (tmp_path / "notes.txt").write_text("not data")
    for path in (tmp_path, f"{tmp_path}/**/*.parquet", f"file://{tmp_path}"):
        rows = reader(path, "t2i")
        assert [f.name for f in rows.files] == ["b.parquet", "sub/a.parquet"]
        assert rows.files[0].size == (tmp_path / "b.parquet").stat().st_size
        assert rows.record("sub/a.parquet", 0).inputs == ("sub/a.parquet",)


def test_links_are_followed_and_names_may_hold_anything(tmp_path: Path) -> None:
    """As in the cache of a hub, whose snapshots are links to blobs."""
    names = ("a b.parquet", "größe [v2]?.parquet")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "set [1]*").mkdir()
    for name in names:
        pq.write_table(pa.table({"caption": [name], "image_bytes": [png("red")]}), tmp_path / "blobs" / name)
        (tmp_path / "set [1]*" / name).symlink_to(tmp_path / "blobs" / name)
    for folder in ("blobs", "set [1]*"):
        rows = reader(tmp_path / folder, "t2i")
        assert tuple(f.name for f in rows.files) == names
        assert [rows.record(name, 0).inputs for name in names] == [(name,) for name in names]
        assert [f.size for f in rows.files] == [(tmp_path / "blobs" / name).stat().st_size for name in names]
        assert rows.files == reader(tmp_path / folder, "t2i").files
    stamps = [f.stamp for f in rows.files]
    os.utime(tmp_path / "blobs" / names[0], (1, 1))
    assert [f.stamp for f in reader(tmp_path / "set [1]*", "t2i").files] == ["mtime 1.0", stamps[1]]
    (tmp_path / "blobs" / names[0]).unlink()
    with pytest.raises(DataSetError, match=r"cannot be listed .*No such file"):
        reader(tmp_path / "set [1]*", "t2i")


def test_media_by_path_and_url(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "red.png").write_bytes(png("red"))
    references = ["media/red.png", str(tmp_path / "media/red.png"), f"file://{tmp_path}/media/red.png", "gone.png"]
    pq.write_table(pa.table({"caption": ["c"] * 4, "image_bytes": references}), tmp_path / "a.parquet")
    rows = reader(tmp_path / "a.parquet", "t2i", raw_bytes_input=False)
    assert [rows.media("a.parquet", i, "image_bytes") for i in range(3)] == [png("red")] * 3
    with pytest.raises(RecordError, match=r"'gone.png' cannot be read"):
        rows.media("a.parquet", 3, "image_bytes")
    with pytest.raises(RecordError, match="set raw_bytes_input: false"):
        reader(tmp_path / "a.parquet", "t2i").media("a.parquet", 0, "image_bytes")


def test_row_groups_beyond_the_cache_are_read_again(tmp_path: Path) -> None:
    contents = [png(color) for color in ("red", "green", "blue", "white", "black")]
    pq.write_table(pa.table({"caption": ["c"] * 5, "image_bytes": contents}), tmp_path / "a.parquet", row_group_size=2)
    rows = RecordReader(SourceConfig("src", str(tmp_path), "t2i"), cache_bytes=1)
    for row in (4, 0, 3, 1, 2, 0):
        assert rows.media("a.parquet", row, "image_bytes") == contents[row]


def test_errors_name_file_rule_and_remedy(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["c"], "picture": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataSetError, match=r"a.parquet: lacks columns for task t2i: expected caption, image_bytes or"):
        reader(tmp_path, "t2i").record("a.parquet", 0)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataSetError, match=r"broken.parquet: is not a readable parquet file"):
        reader(tmp_path / "broken.parquet", "t2i").footer("broken.parquet")
    with pytest.raises(DataSetError, match="names no parquet file; give a file, folder or glob"):
        reader(tmp_path / "nothing", "t2i")
    with pytest.raises(DataSetError, match="path is empty"):
        reader("", "t2i")
    with pytest.raises(DataSetError, match="task 'i2i' is unknown; use one of t2i, t2v"):
        reader(tmp_path, "i2i")
    with pytest.raises(DataSetError, match="has no file 'other.parquet'"):
        reader(tmp_path, "t2i").record("other.parquet", 0)


def test_bad_rows_are_record_errors(tmp_path: Path) -> None:
    arrays = [[b"a", b"b"], [b"\xff\xfe", b"b"], [b"a", b"b"], None]
    kinds = [["text"], ["text", "image"], ["text", "sound"], ["text", "image"]]
    pq.write_table(pa.table({"interleave_array": arrays, "element_dtype_array": kinds}), tmp_path / "a.parquet")
    rows = reader(tmp_path, "s2i")
    for row, message in enumerate(("must have the same length", "not UTF-8", "type 'sound'", "must have the same")):
        with pytest.raises(RecordError, match=message):
            rows.record("a.parquet", row)
    with pytest.raises(RecordError, match="row 9: the file has 4 rows"):
        rows.record("a.parquet", 9)
    bad = reader(shared_path("data", "bad_text2video.parquet"), "t2v")
    with pytest.raises(RecordError, match="is empty"):
        bad.media("bad_text2video.parquet", 1, "video_bytes")
