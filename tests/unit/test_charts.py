"""Charts are well-formed SVG whose marks carry their values, and pages need nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from megatron_lance.profiling.charts import html_table, lines, paragraph, stacked_bars, write_page

SVG = "{http://www.w3.org/2000/svg}"


def marks(svg: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter(SVG + kind) if e.find(SVG + "title") is not None]


def test_bars_are_as_long_as_their_values() -> None:
    svg = stacked_bars(
        "a <title>", "s", {"one": {"x": 1.0, "y": 2.0, "none": 0.0}, "two & more": {"x": 4.0}}, limit=5.0
    )
    pieces = marks(svg, "rect")
    widths = [float(e.attrib["width"]) for e in pieces]
    assert len(pieces) == 3
    assert abs(widths[1] / widths[0] - 2) < 0.01 and abs(widths[2] / widths[0] - 4) < 0.01
    assert pieces[0][0].text == "one, x: 1 s" and "none" not in svg
    assert len(re.findall("#c00000", svg)) == 1


def test_points_lie_where_their_values_are() -> None:
    svg = lines("curve", "devices", "rate", {"a": [(8, 10.0), (16, 20.0), (64, 0.0)]}, log_x=True)
    x, y = ([float(e.attrib[axis]) for e in marks(svg, "circle")] for axis in ("cx", "cy"))
    assert abs((x[2] - x[1]) / (x[1] - x[0]) - 2) < 0.01  # doublings lie equally far apart
    assert y[1] < y[0] < y[2] and abs((y[2] - y[1]) / (y[2] - y[0]) - 2) < 0.01


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(page, "A & B", [("first", paragraph("1 < 2")), ("second", html_table(["a"], [["<b>"]]))])
    text = page.read_text()
    assert "A &amp; B" in text and "1 &lt; 2" in text and "&lt;b&gt;" in text
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)", text)
