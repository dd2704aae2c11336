"""Charts show their values at the right places, and pages need nothing else."""

from __future__ import annotations

import base64
import re
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes

from megatron_lance.profiling.charts import Bars, Chart, draw, image, svg, thinned
from megatron_lance.profiling.page import html_table, page, paragraph, preformatted, section


def decoded(uri: str) -> str:
    return base64.b64decode(uri.partition(",")[2]).decode()


def axes_of(chart: Chart | Bars) -> Axes:
    (axes,) = draw(chart).axes
    return axes


def test_bars_are_as_long_as_their_pieces() -> None:
    bars = {"one": {"x": 1.0, "y": 2.0, "none": 0.0}, "two & more": {"x": 4.0}}
    axes = axes_of(Bars("memory", "GiB", bars, limit=6.0))
    pieces = {(round(p.get_y()), p.get_x()): p.get_width() for p in axes.patches if p.get_width()}  # type: ignore[attr-defined]
    assert pieces == {(0, 0.0): 1.0, (0, 1.0): 2.0, (1, 0.0): 4.0}
    assert [text.get_text() for text in axes.get_yticklabels()] == ["one", "two & more"]
    assert [text.get_text() for text in axes.texts] == ["3", "4"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["limit", "x", "y"]  # type: ignore[union-attr]
    assert axes.lines[0].get_xdata()[0] == 6.0 and axes.get_xlim()[1] > 6.0  # type: ignore[index]
    assert axes.yaxis_inverted(), "the first bar is at the top"


def test_a_long_legend_beside_few_bars_is_whole() -> None:
    figure = draw(Bars("time", "s", {"rank 0": {f"piece {i}": 1.0 for i in range(13)}}))
    figure.canvas.draw()
    legend = figure.axes[0].get_legend()
    assert legend is not None and figure.bbox.y0 <= legend.get_window_extent().y0
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_bars_of_nothing_are_drawn() -> None:
    assert "empty" in decoded(svg(Bars("empty", "s", {"one": {"x": 0.0}})))


def test_doublings_lie_equally_far_apart_and_are_numbered() -> None:
    axes = axes_of(
        Chart("rate", "1/s", {"a": ([8, 16, 1024], [3.0, 2.0, 1.0])}, x="devices", doublings=True, from_zero=True)
    )
    places = axes.transData.transform([(8, 0), (16, 0), (64, 0)])[:, 0]
    assert places[2] - places[1] == pytest.approx(2 * (places[1] - places[0]))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["8", "16", "1,024"]
    assert axes.get_xlabel() == "devices" and axes.get_ylim()[0] == 0
    steps = axes_of(Chart("time", "s", {"a": ([1, 2, 3], [3.0, 2.0, 1.0])})).get_xticks()
    assert all(place == round(place) for place in steps), "there is no step 1.5"


def test_a_chart_is_an_svg_with_its_names_and_marks() -> None:
    chart = Chart("speed", "tokens/s", {"here": ([1, 2, 3], [1.0, 2.0, 1.0]), "there": ([1, 2], [0.5, 0.1])})
    plain, marked = (decoded(svg(chart, marks)) for marks in ((), [(2, "skipped", "tab:red")]))
    assert ElementTree.fromstring(plain).tag.endswith("svg")
    for part in ("speed (tokens/s)", "here", "there", "step"):
        assert part in plain
    red = "#d62728"
    assert red in marked and red not in plain
    assert decoded(svg(chart)) == plain  # the same numbers give the same file


def test_long_curves_are_thinned_to_means_and_ranges() -> None:
    steps, values = list(range(1000)), [float(i % 10) for i in range(1000)]
    curve = thinned(steps, values, points=100)
    assert curve.shape == (4, 100)
    assert curve[:, 0].tolist() == [4.5, 4.5, 0.0, 9.0] and curve[0, -1] == 994.5
    assert thinned(steps[:3], values[:3], points=100).tolist() == [[0, 1, 2]] * 4


def test_a_page_needs_nothing_else_and_escapes_what_it_is_given() -> None:
    picture = image(Bars("a <title>", "s", {"one": {"x": 1.0}}))
    table = html_table([["<b>", "2"]], ["a", "b"], "numbers")
    text = page("A & B", section("x < y", paragraph("1 < 2"), preformatted("3 < 4"), picture, table))
    for part in (
        "A &amp; B",
        "x &lt; y",
        "1 &lt; 2",
        "3 &lt; 4",
        "&lt;b&gt;",
        "a &lt;title&gt;",
        '<table class="numbers">',
    ):
        assert part in text, part
    assert not re.search(r'(src|href)="(?!data:)|https?://', text)
