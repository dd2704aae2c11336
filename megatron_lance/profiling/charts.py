"""Charts as SVG text, for pages that need no other file and no network.

Station: figures -> [SVG, HTML page] -> reports of the profiler and the planner.  Colours are told apart in print too;
every mark carries its value as a tooltip.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = (
    "#2f5d8c", "#c8641b", "#3f8f5f", "#8c3f6d", "#b8a13a", "#4aa3b8", "#7a5a3c", "#6e6ec0", "#a0a0a0", "#d98080",
    "#5c8a2f", "#303030", "#c0c0c0",
)  # fmt: skip
WIDTH, ROW, RIGHT, TOP, BOTTOM, FONT = 860, 24, 20, 34, 44, 12
"""Pixels."""
HEIGHT = 300
"""Pixels of the plot area of lines."""


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" font-size="{FONT}">'
        f"{html.escape(text)}</text>"
    )


def _svg(width: float, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(body)}</svg>'
    )


def _nice(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * step for step in (1, 2, 5, 10) if power * step >= value * (1 - 1e-9))


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _legend(names: Sequence[str], y: float, left: float) -> tuple[list[str], float]:
    """(marks and names in rows, the height they take)."""
    body, x, row = [], float(left), 0
    for i, name in enumerate(names):
        needed = 24 + 7 * len(name)
        if x + needed > WIDTH - RIGHT and x > left:
            x, row = float(left), row + 1
        at = y + 18 * row
        body.append(f'<rect x="{x:.0f}" y="{at - 9:.0f}" width="11" height="11" fill="{COLOURS[i % len(COLOURS)]}"/>')
        body.append(_text(x + 15, at, name))
        x += needed
    return body, 18.0 * (row + 1)


def stacked_bars(title: str, unit: str, bars: Mapping[str, Mapping[str, float]], limit: float | None = None) -> str:
    """Horizontal bars made of named pieces.

    Args:
        title: of the chart.
        unit: of the values.
        bars: by name of the bar, its pieces by name; not negative.
        limit: drawn as a line across all bars.
    """
    names = list(dict.fromkeys(name for pieces in bars.values() for name, value in pieces.items() if value > 0))
    left = max(120, 12 + max(7 * len(bar) for bar in bars))
    most = max([sum(pieces.values()) for pieces in bars.values()] + [limit or 0.0]) or 1.0
    step = _nice(most / 5)
    scale = (WIDTH - left - RIGHT) / (math.ceil(most / step - 1e-9) * step)
    legend, legend_height = _legend(names, TOP + 18, left)
    top = TOP + legend_height + 12
    bottom = top + ROW * len(bars)
    body = [_text(10, 20, title, weight="bold"), *legend]
    for i in range(math.ceil(most / step - 1e-9) + 1):
        x = left + i * step * scale
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.0f}" y2="{bottom:.0f}" stroke="#dddddd"/>')
        body.append(_text(x, bottom + 16, _number(i * step), "middle"))
    body.append(_text(WIDTH - RIGHT, bottom + 34, unit, "end"))
    for row, (bar, pieces) in enumerate(bars.items()):
        y, x = top + row * ROW + 4, float(left)
        body.append(_text(left - 8, y + 13, bar, "end"))
        for name in names:
            size = pieces.get(name, 0.0) * scale
            if size > 0:
                tip = html.escape(f"{bar}, {name}: {pieces[name]:.4g} {unit}")
                colour = COLOURS[names.index(name) % len(COLOURS)]
                body.append(
                    f'<rect x="{x:.1f}" y="{y:.0f}" width="{size:.1f}" height="{ROW - 8}" fill="{colour}">'
                    f"<title>{tip}</title></rect>"
                )
                x += size
        body.append(_text(x + 4, y + 13, _number(sum(pieces.values()))))
    if limit is not None:
        x = left + limit * scale
        body.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4:.0f}" y2="{bottom:.0f}" stroke="#c00000" stroke-width="2"/>'
        )
    return _svg(WIDTH, bottom + BOTTOM, body)


def lines(
    title: str, x_name: str, y_name: str, series: Mapping[str, Sequence[tuple[float, float]]], log_x: bool = False
) -> str:
    """Points joined by lines, from zero on the y axis.

    Args:
        title: of the chart.
        x_name: of the x axis.
        y_name: of the y axis.
        series: by name, points by ascending x.
        log_x: doublings of x lie equally far apart.
    """
    points = [point for values in series.values() for point in values]

    def place(x: float) -> float:
        return math.log2(x) if log_x else x

    low, high = min(place(x) for x, _ in points), max(place(x) for x, _ in points)
    most = max(y for _, y in points) or 1.0
    step = _nice(most / 5)
    ceiling = math.ceil(most / step - 1e-9) * step
    left = 80
    legend, legend_height = _legend(list(series), TOP + 18, left)
    top = TOP + legend_height + 28
    across = (WIDTH - left - 40) / max(high - low, 1e-9)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (place(x) - low) * across, top + HEIGHT * (1 - y / ceiling)

    body = [_text(10, 20, title, weight="bold"), *legend]
    for i in range(round(ceiling / step) + 1):
        y = at(points[0][0], i * step)[1]
        body.append(f'<line x1="{left}" x2="{WIDTH - 40}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        body.append(_text(left - 6, y + 4, _number(i * step), "end"))
    for x in sorted({x for x, _ in points}):
        body.append(_text(at(x, 0)[0], top + HEIGHT + 18, _number(x), "middle"))
    body.append(_text(WIDTH - 40, top + HEIGHT + 36, x_name, "end"))
    body.append(_text(left, top - 8, y_name))
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*value) for value in values))
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for value in values:
            x, y = at(*value)
            tip = html.escape(f"{name}: {_number(value[0])}, {value[1]:.4g}")
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{tip}</title></circle>')
    return _svg(WIDTH, top + HEIGHT + BOTTOM + 6, body)


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


STYLE = (
    "body{font-family:sans-serif;max-width:980px;margin:24px auto;color:#222}h1{font-size:22px}h2{font-size:17px;"
    "margin-top:32px}table{border-collapse:collapse;font-size:13px}td,th{padding:3px 9px;border-bottom:1px solid #ddd;"
    "text-align:right}td:first-child,th:first-child{text-align:left}p{line-height:1.45}pre{background:#f5f5f5;"
    "padding:10px;overflow-x:auto;font-size:12px}"
)


def write_page(path: Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write one HTML file that needs nothing else.

    Args:
        path: to write.
        title: of the page.
        sections: (heading, HTML) in order.
    """
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n",
        encoding="utf-8",
    )


def paragraph(text: str) -> str:
    """A text as HTML."""
    return f"<p>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    """A text as it stands, as HTML."""
    return f"<pre>{html.escape(text)}</pre>"
