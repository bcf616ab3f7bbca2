"""The Pareto front as PNG and SVG for a paper: one still picture, the same bytes for the same search."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moesaic.nas.context import Context
from moesaic.nas.report.colours import GRID, INK, KINDS, RIVALS
from moesaic.nas.report.data import ON_FRONT, Point, axis_title, front_line, limit_text
from moesaic.nas.search.budget import BudgetLine
from moesaic.search_spaces.files import write_atomically

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "moesaic",
}
_MARKERS: dict[str, dict[str, Any]] = {
    "evaluated": {"marker": "o", "markersize": 3, "alpha": 0.5, "label": "evaluated"},
    "over": {"marker": "x", "markersize": 4, "label": "over budget when measured"},
    "front": {"marker": "o", "markersize": 5, "label": "Pareto front"},
    "exported": {"marker": "D", "markersize": 5, "label": "front, exported"},
    "best": {"marker": "*", "markersize": 12, "label": "chosen", "zorder": 3},
}


def write_paper_figures(
    directory: Path, points: Sequence[Point], budget: Sequence[BudgetLine], context: Context, cost: str, unit: str
) -> None:
    """Writes ``pareto.png`` and ``pareto.svg``: inherited loss, in ``unit``, against ``cost``."""
    with rc_context(_STYLE):  # pyright: ignore[reportArgumentType]  (it names every key in a literal type)
        figure = paper_figure(points, budget, context, cost, unit)
        for name, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            write_atomically(
                directory / f"pareto.{name}",
                lambda path, name=name, metadata=metadata: figure.savefig(
                    path, format=name, dpi=200, metadata=metadata
                ),
            )


def paper_figure(
    points: Sequence[Point], budget: Sequence[BudgetLine], context: Context, cost: str, unit: str
) -> Figure:
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for members, style in _groups(points):
        errors = [p.standard_error or 0.0 for p in members] if members[0].kind in ON_FRONT else None
        x, y = [p.costs[cost] for p in members], [p.loss or 0.0 for p in members]
        axes.errorbar(x, y, yerr=errors, linestyle="none", elinewidth=0.7, capsize=2, **style)
    line = front_line(points, cost)
    axes.step([x for x, _ in line], [y for _, y in line], where="post", color=KINDS["front"], linewidth=1)
    for limit in (line for line in budget if line.cost == cost):
        axes.axvline(
            limit.limit, color=INK, linestyle="--", linewidth=1, label=limit_text(cost, limit.limit, limit.bind)
        )
    axes.set_xlabel(axis_title(cost, context))
    axes.set_ylabel(f"inherited loss, {unit}")
    if cost != "latency":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _groups(points: Sequence[Point]) -> list[tuple[list[Point], dict[str, Any]]]:
    """Points of one legend entry each, with their style."""
    kinds = {kind: [point for point in points if point.kind == kind] for kind in _MARKERS}
    groups = [(members, {"color": KINDS[kind], **_MARKERS[kind]}) for kind, members in kinds.items() if members]
    rivals = [point for point in points if point.kind == "rival"]
    for rival, colour, marker in zip(rivals, cycle(RIVALS), cycle("s^vP"), strict=False):
        style = {"color": colour, "marker": marker, "markersize": 6, "markerfacecolor": "none", "markeredgewidth": 1.5}
        groups.append(([rival], {**style, "label": f"rival {rival.label}", "zorder": 3}))
    return groups
