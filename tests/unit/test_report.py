"""The page of a run: what stands in it, whole in one file, also of a run that goes on or has almost nothing."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lance.config.errors import UserError
from megatron_lance.profiling.charts import svg
from megatron_lance.training.events import EventLog
from megatron_lance.training.metrics import MetricsWriter
from megatron_lance.training.report import Record, charts, page, read_run
from tests.command import Commander


def line(step: int, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, of the fields that a page reads."""
    usual = {
        **{"step": step, "loss": 1.0 / step, "ce_loss": 2.0, "velocity_loss": 0.5, "grad_norm": 5.0},
        **{"learning_rate": 1e-3, "tokens_per_second": 100.0 + step, "padded_tokens_per_second": 120.0 + step},
        **{"mfu": None, "fill": 0.9, "step_seconds": 2.0},
        **{"data_seconds": 0.1, "save_stall_seconds": 0.0, "broken": 0, "skipped": False, "memory_bytes": 2**30},
        **{"loss_by_task": {"t2i": 0.25}, "loss_by_source": {"pictures": 0.125}},
        **{"grad_norm_by_expert": {"und": 3.0, "gen": 4.0, "shared": 0.0}, "tokens_seen": {"text": 10 * step}},
    }
    return usual | values


def write_lines(path: Path, lines: list[dict[str, Any]], torn: str = "") -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines) + torn, encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Five steps, one of them skipped; restarted once; samples of two previews; a validation."""
    folder = tmp_path / "a <run>"
    with MetricsWriter(folder, True) as writer:
        for step in (2, 4):
            picture = np.full((16, 16, 3), 50 * step, np.uint8)
            writer.board.add_image("preview/00 t2i a <red> circle", picture, step, dataformats="HWC")
    write_lines(
        folder / "metrics.jsonl", [line(s, skipped=s == 3, loss=None if s == 3 else 1 / s) for s in range(1, 6)]
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    write_lines(folder / "validation.jsonl", [{"step": 4, "loss": 0.5, "loss_by_task": {"t2i": 0.5}}])
    answers = [{"line": 1, "task": "i2t", "question": "Which?", "answer": "<b>red</b>"}]
    write_lines(folder / "preview.jsonl", [{"step": 4, "answers": answers}])
    events = EventLog(folder, enabled=True)
    events.write(0, "started", ranks=2)
    events.write(3, "skipped", packs=[4, 5])
    events.write(3, "ended", exit_code=6, reason="Stopped", message="stopped by SIGTERM")
    events.write(3, "started", ranks=1)
    events.write(5, "ended", exit_code=0, reason="finished")
    (folder / "config.yaml").write_text("training: {seed: 5}\n", encoding="utf-8")
    return folder


class Reader(HTMLParser):
    """Collects sources of pictures and text; a tag that is not closed is an error of the test."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.sources.append(dict(attrs)["src"] or "")
        elif tag not in ("meta", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


def test_a_page_is_whole_and_says_what_happened(run_dir: Path) -> None:
    record = read_run(run_dir)
    assert [each["step"] for each in record.steps] == [1, 2, 3, 4, 5]  # without the torn line
    text = page([record])
    reader = read(text)
    assert reader.sources and all(source.startswith("data:image/") for source in reader.sources)
    assert not re.search(r"(src|href)=\"(?!data:|#)", text) and "http" not in re.sub(r"base64,[^\"]*", "", text)
    words = " ".join(reader.words)
    for part in (
        *("a <run>", "5; finished (exit code 0)", "1 at step 1, 0.2 at the last", "text 50"),
        *("103 real tokens/s", "Stopped", "stopped by SIGTERM", "packs [4, 5]", "seed: 5"),
        *("00 t2i a <red> circle", "<b>red</b>", "step 2", "step 4"),
    ):
        assert part in words, part
    for name, value in (("starts", "2"), ("steps left out", "1")):
        assert f"<td>{name}</td><td>{value}</td>" in text
    pictures = [decoded(source) for source in reader.sources if "image/png" in source]
    assert len(pictures) == 2 and all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_a_run_that_was_started_again_has_not_ended(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EventLog(run_dir, enabled=True).write(5, "started", ranks=2)
    monkeypatch.chdir(run_dir)
    text = page([read_run(Path())])
    assert "<td>5; running, or killed</td>" in text and '<h1 id="a &lt;run&gt;">' in text


def test_every_curve_is_drawn(run_dir: Path) -> None:
    record = read_run(run_dir)
    found = {chart.title: chart for chart in charts(record)}
    assert found["loss"].series == {
        "loss": ([1, 2, 4, 5], [1.0, 0.5, 0.25, 0.2]),  # nothing where it was not finite
        "validation loss": ([4], [0.5]),
    }
    assert list(found["gradient norm before clipping"].series) == ["grad_norm", "und", "gen", "shared"]
    assert found["most memory of a rank"].series["memory_bytes"][1] == [1.0] * 5
    for title, names in (
        ("loss by task", ["t2i"]),
        ("loss by source", ["pictures"]),
        ("validation loss by task", ["t2i"]),
        ("tokens seen by kind", ["text"]),
        ("learning rate", ["learning_rate"]),
        ("speed", ["tokens_per_second", "padded_tokens_per_second"]),
        ("where the time of a step goes", ["step_seconds", "data_seconds", "save_stall_seconds"]),
    ):
        assert list(found[title].series) == names
    assert "use of the devices' peak" not in found  # it is not known
    for chart in found.values():
        assert chart.title in decoded(svg(chart)).decode()


def test_several_runs_on_one_page(run_dir: Path, command: Commander, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    write_lines(tmp_path / "bare" / "metrics.jsonl", [line(1)])
    done = command("report 'a <run>' bare --out pages/all.html", folder=tmp_path)
    assert (done.code, done.out.strip()) == (0, "pages/all.html"), done.err
    reader = read((tmp_path / "pages" / "all.html").read_text(encoding="utf-8"))
    assert "running, or killed" in " ".join(reader.words)
    alone = command("report bare", folder=tmp_path)
    assert alone.code == 0 and (tmp_path / "bare" / "report.html").is_file()


def test_a_folder_without_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no step in metrics.jsonl; name the training.run_dir of a run"):
        read_run(tmp_path)


def test_a_record_needs_only_steps() -> None:
    text = page([Record(Path("run"), [line(1)], [], [], [], {}, "")])
    assert "Samples" not in text and "Events" not in text and "Configuration" not in text
