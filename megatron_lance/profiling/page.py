"""One HTML file that needs nothing else: it can be mailed or archived.

Station: tables, texts and pictures -> [page] -> pages of runs, profiles and plans.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1240px; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; font-size: 14px } td, th { padding: 2px 12px 2px 0; text-align: left;
vertical-align: top } .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(560px, 1fr)); gap: 8px }
img { width: 100% } .samples img { image-rendering: auto; width: 112px; display: block }
.numbers td, .numbers th { text-align: right } .numbers td:first-child, .numbers th:first-child { text-align: left }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px } .quiet { color: #777 }
"""


def html_table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), kind: str = "") -> str:
    """A table of texts.

    Args:
        rows: of cells.
        head: names of the columns; empty: none.
        kind: class of the table: "numbers" aligns all columns but the first to the right.
    """
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    opening = f'<table class="{kind}">' if kind else "<table>"
    return f"{opening}{''.join(lines)}</table>"


def paragraph(text: str) -> str:
    """A text as HTML."""
    return f"<p>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    """A text as it stands, as HTML."""
    return f"<pre>{html.escape(text)}</pre>"


def section(heading: str, *content: str) -> str:
    """HTML below a heading."""
    return f"<h2>{html.escape(heading)}</h2>{''.join(content)}"


def page(title: str, body: str) -> str:
    """The whole file.

    Args:
        title: of the window.
        body: HTML.
    """
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
