"""Pieces of HTML with all text escaped, because run names and file contents come from the user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from moesaic.nas.costs.compliance import Status

CLASSES: dict[Status, str] = {"inside": "good", "within tolerance": "warn", "over": "bad"}
"""Classes of the style sheet."""
_BUTTONS = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]


@dataclass(frozen=True)
class Markup:
    """HTML that is safe to place in a page as it is."""

    html: str


Content = str | Markup


def render(content: Content) -> str:
    return content.html if isinstance(content, Markup) else escape(content)


def flag(text: str, status: Status) -> Markup:
    return Markup(f'<span class="{CLASSES[status]}">{escape(text)}</span>')


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[Content]], chosen: int | None = None) -> str:
    """A table whose first column holds names; row ``chosen`` is highlighted."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [
        f"<tr{' class=chosen' if index == chosen else ''}>{''.join(f'<td>{render(cell)}</td>' for cell in row)}</tr>"
        for index, row in enumerate(rows)
    ]
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def plot(name: str, figure: go.Figure) -> str:
    """An interactive figure; its page holds plotly's script."""
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        default_width="100%",
        config={"responsive": True, "displaylogo": False, "modeBarButtons": _BUTTONS},
    )
    return f'<div class="plot">{drawn}</div>'


def section(name: str, title: str, parts: Iterable[str]) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'
