"""Charts as SVG pictures inside a page, drawn by matplotlib.

Station: figures -> [chart] -> pages of runs, profiles and plans.  A picture is a data URI, so no other file is needed.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

POINTS = 400
"""Of a curve; longer ones are drawn as the mean of as many stretches, with their range behind it."""
_MOST_NAMED = 12
_COLOURS = [colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]


@dataclass(frozen=True)
class Chart:
    """Curves.

    Attributes:
        title: of the chart.
        unit: of the values; empty if they have none.
        series: (x, values) by name.
        x: name of the x axis.
        log: whether values are on a logarithmic scale.
        doublings: whether doublings of x lie equally far apart, and every x has its number.
        from_zero: whether the scale begins at 0.
        dots: whether every value is marked.
    """

    title: str
    unit: str
    series: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    x: str = "step"
    log: bool = False
    doublings: bool = False
    from_zero: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Bars:
    """Horizontal bars made of named pieces, with their sums.

    Attributes:
        title: of the chart.
        unit: of the values.
        bars: by name of the bar, its pieces by name; not negative.
        limit: drawn as a line across all bars; None: none.
    """

    title: str
    unit: str
    bars: Mapping[str, Mapping[str, float]]
    limit: float | None = None

    @property
    def pieces(self) -> list[str]:
        """Names of the pieces that some bar has."""
        every = (name for pieces in self.bars.values() for name, value in pieces.items() if value > 0)
        return list(dict.fromkeys(every))


def thinned(steps: Sequence[int], values: Sequence[float], points: int = POINTS) -> np.ndarray:
    """float64 [4, n]: x, mean, least and greatest value of at most `points` stretches of a curve."""
    pieces = min(points, len(steps))
    parts = zip(np.array_split(np.asarray(steps, float), pieces), np.array_split(values, pieces), strict=True)
    return np.array([(s.mean(), v.mean(), v.min(), v.max()) for s, v in parts]).T


def draw(chart: Chart | Bars, marks: Sequence[tuple[int, str, str]] = ()) -> Figure:
    """A chart as a figure.

    Args:
        chart: what is drawn.
        marks: (x, event, colour) of vertical lines across curves.
    """
    if isinstance(chart, Chart):
        size = (6.2, 2.9)
    else:  # as high as the bars or the legend beside them
        size = (10.5, 0.9 + max(0.26 * len(chart.bars), 0.18 * (1 + len(chart.pieces))))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title, loc="left")
    axes.grid(alpha=0.25)
    if isinstance(chart, Bars):
        _bars(axes, chart)
        return figure
    for name, (steps, values) in chart.series.items():
        _curve(axes, chart, name, thinned(steps, values))
    for x, _, colour in marks:
        axes.axvline(x, color=colour, linewidth=0.8, linestyle=":")
    _scales(axes, chart)
    return figure


def svg(chart: Chart | Bars, marks: Sequence[tuple[int, str, str]] = ()) -> str:
    """A chart as a data URI; the same figures give the same text.

    Args:
        chart: what is drawn.
        marks: (x, event, colour) of vertical lines across curves.
    """
    with rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": chart.title}):
        file = io.StringIO()
        draw(chart, marks).savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue().encode()).decode()}"


def image(chart: Chart | Bars, marks: Sequence[tuple[int, str, str]] = ()) -> str:
    """A chart as HTML; see `svg`."""
    return f'<img alt="{html.escape(chart.title)}" src="{svg(chart, marks)}">'


def _curve(axes: Any, chart: Chart, name: str, curve: np.ndarray) -> None:
    x, mean, least, greatest = curve
    (line,) = axes.plot(x, mean, label=name, linewidth=1.1, marker="o" if chart.dots else None, markersize=3)
    if (greatest > least).any():
        axes.fill_between(x, least, greatest, color=line.get_color(), alpha=0.2, linewidth=0)


def _scales(axes: Any, chart: Chart) -> None:
    """Scales and legend."""
    axes.set_xlabel(chart.x)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if chart.doublings:
        axes.set_xscale("log", base=2)
        places = sorted({x for steps, _ in chart.series.values() for x in steps})
        axes.set_xticks(places, [f"{x:,}" for x in places], rotation=30, fontsize=7)
    if chart.log and all(value > 0 for _, values in chart.series.values() for value in values):
        axes.set_yscale("log")
    if chart.from_zero:
        axes.set_ylim(0, 1.08 * max(value for _, values in chart.series.values() for value in values) or 1)
    if 1 < len(chart.series) <= _MOST_NAMED or list(chart.series) != [chart.title]:
        axes.legend(fontsize=7, ncols=1 + len(chart.series) // 7, framealpha=0.6)


def _bars(axes: Any, chart: Bars) -> None:
    """Pieces one behind the other, the first bar at the top."""
    rows = range(len(chart.bars))
    left = np.zeros(len(chart.bars))
    for number, name in enumerate(chart.pieces):
        sizes = np.array([pieces.get(name, 0.0) for pieces in chart.bars.values()])
        axes.barh(rows, sizes, left=left, height=0.7, label=name, color=_COLOURS[number % len(_COLOURS)])
        left += sizes
    for row, whole in zip(rows, left, strict=True):
        axes.annotate(f"{whole:.3g}", (whole, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    if chart.limit is not None:
        axes.axvline(chart.limit, color="#c00000", linewidth=1.5, label="limit")
    axes.set_yticks(rows, list(chart.bars))
    axes.set_ylim(len(chart.bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.08 * max([*left, chart.limit or 0.0]) or 1)
    axes.grid(visible=False, axis="y")
    if chart.pieces:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.02), borderaxespad=0.3, frameon=False)
