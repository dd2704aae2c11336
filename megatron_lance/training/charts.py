"""Line charts as SVG files inside a page.

Station: numbers over steps -> [chart] -> report.  Drawn by matplotlib, which the extra `report` installs.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_lance.config.errors import UserError

POINTS = 400
"""Of a curve; longer ones are drawn as the mean of as many stretches, with their range behind it."""
_MOST_NAMED = 12


@dataclass(frozen=True)
class Chart:
    """Curves over steps.

    Attributes:
        title: of the chart.
        unit: of the values; empty if they have none.
        series: (steps, values) by name.
        log: whether values are on a logarithmic scale.
        from_zero: whether the scale begins at 0.
        dots: whether every value is marked.
    """

    title: str
    unit: str
    series: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    log: bool = False
    from_zero: bool = False
    dots: bool = False


def thinned(steps: Sequence[int], values: Sequence[float], points: int = POINTS) -> np.ndarray:
    """float64 [4, n]: step, mean, least and greatest value of at most `points` stretches of a curve."""
    pieces = min(points, len(steps))
    parts = zip(np.array_split(np.asarray(steps, float), pieces), np.array_split(values, pieces), strict=True)
    return np.array([(s.mean(), v.mean(), v.min(), v.max()) for s, v in parts]).T


def svg(chart: Chart, marks: Sequence[tuple[int, str, str]] = ()) -> str:
    """A chart as a data URI.

    Args:
        chart: what is drawn.
        marks: (step, event, colour) of vertical lines.

    Raises:
        UserError: if matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            'matplotlib: is not installed, which draws the curves; pip install "megatron-lance[report]"'
        ) from error
    with rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=(6.2, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for name, (steps, values) in chart.series.items():
            _draw(axes, chart, name, thinned(steps, values))
        for step, _, colour in marks:
            axes.axvline(step, color=colour, linewidth=0.8, linestyle=":")
        _finish(axes, chart)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue().encode()).decode()}"


def _draw(axes: Any, chart: Chart, name: str, curve: np.ndarray) -> None:
    step, mean, least, greatest = curve
    (line,) = axes.plot(step, mean, label=name, linewidth=1.1, marker="o" if chart.dots else None, markersize=3)
    if (greatest > least).any():
        axes.fill_between(step, least, greatest, color=line.get_color(), alpha=0.2, linewidth=0)


def _finish(axes: Any, chart: Chart) -> None:
    """Title, scales and legend."""
    axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title, loc="left")
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    if chart.log and all(value > 0 for _, values in chart.series.values() for value in values):
        axes.set_yscale("log")
    if chart.from_zero:
        axes.set_ylim(0, 1.08 * max(value for _, values in chart.series.values() for value in values) or 1)
    if 1 < len(chart.series) <= _MOST_NAMED or list(chart.series) != [chart.title]:
        axes.legend(fontsize=7, ncols=1 + len(chart.series) // 7, framealpha=0.6)
