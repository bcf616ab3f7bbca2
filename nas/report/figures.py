"""The interactive pictures of a report, drawn with plotly from the values of ``data``."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import cycle
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moesaic.nas.context import Context
from moesaic.nas.report.colours import GRID, INK, KINDS, MODELS, MUTED, PARTS, RIVALS
from moesaic.nas.report.data import (
    COSTS,
    ON_FRONT,
    Curve,
    Evaluated,
    Measurement,
    Model,
    Point,
    axis_title,
    breakdown,
    cost_name,
    front_line,
    limit_text,
    per_text,
)
from moesaic.nas.search.budget import BudgetLine
from moesaic.nas.trust.findings import CheckedMember
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import draw

_MARKERS: dict[str, tuple[str, dict[str, Any]]] = {
    "refused": ("refused: over budget, not evaluated", {"symbol": "line-ns-open", "size": 14}),
    "evaluated": ("evaluated", {"symbol": "circle", "size": 6, "opacity": 0.6}),
    "over": ("evaluated, over budget when measured", {"symbol": "x-thin-open", "size": 8}),
    "front": ("Pareto front", {"symbol": "circle", "size": 9}),
    "exported": ("front, exported", {"symbol": "diamond", "size": 11}),
    "best": ("chosen", {"symbol": "star", "size": 16}),
}
_RIVALS = ("square-open", "triangle-up-open")
_STRIP = 0.07
"""Share of the plot's height for architectures without a loss."""
_LEGEND = {"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"}


def pareto_figure(
    points: Sequence[Point], budget: Sequence[BudgetLine], context: Context, default_cost: str, unit: str
) -> go.Figure:
    """Inherited loss, in ``unit``, against a cost; buttons choose the cost."""
    costs = [cost for cost in COSTS if cost in points[0].costs]
    figure = go.Figure()
    groups = _groups(points)
    for name, marker, members in groups:
        kind = members[0].kind
        without_loss = kind == "refused"
        error = {"type": "data", "array": [p.standard_error or 0 for p in members], "thickness": 1, "width": 3}
        figure.add_scatter(
            x=[p.costs[default_cost] for p in members],
            y=[0 if without_loss else p.loss for p in members],
            error_y=error if kind in ON_FRONT else None,
            mode="markers",
            hovertext=[_hover(p, context, unit) for p in members],
            hoverinfo="text",
            marker=marker,
            name=name,
            yaxis="y2" if without_loss else "y",
        )
    figure.add_scatter(
        **_line_data(points, default_cost),
        mode="lines",
        line={"shape": "hv", "color": KINDS["front"], "width": 1.5},
        name="outline of the front",
        hoverinfo="skip",
    )
    lowest = _STRIP + 0.03 if any(point.kind == "refused" for point in points) else 0
    figure.update_layout(
        **layout(620),
        **_cost_layout(default_cost, budget, context),
        yaxis={"title": f"inherited validation loss, {unit}", "domain": [lowest, 1]},
        yaxis2={"domain": [0, _STRIP], "range": [-1, 1], "visible": False, "fixedrange": True, "anchor": "x"},
        hoverlabel={"font": {"family": "ui-monospace, monospace", "size": 11}, "align": "left", "bgcolor": "#fff"},
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "y": 1.1,
                "xanchor": "left",
                "yanchor": "bottom",
                "showactive": True,
                "active": costs.index(default_cost),
                "bgcolor": "#fff",
                "bordercolor": GRID,
                "buttons": [
                    {
                        "label": cost_name(cost),
                        "method": "update",
                        "args": [
                            {
                                "x": [
                                    *([p.costs[cost] for p in members] for _, _, members in groups),
                                    _line_data(points, cost)["x"],
                                ],
                                "y": [
                                    *([p.loss or 0 for p in members] for _, _, members in groups),
                                    _line_data(points, cost)["y"],
                                ],
                            },
                            _cost_layout(cost, budget, context),
                        ],
                    }
                    for cost in costs
                ],
            }
        ],
    )
    return figure


def history_figure(history: Sequence[Evaluated], rivals: Sequence[Point], unit: str) -> go.Figure:
    """Best loss so far, in ``unit``, and hypervolume against evaluations."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    x = [step.evaluations for step in history]
    lines = (
        ("best loss inside the budget", [step.best for step in history], KINDS["best"]),
        ("hypervolume", [step.hypervolume for step in history], KINDS["front"]),
    )
    for row, (name, y, colour) in enumerate(lines, start=1):
        figure.add_scatter(x=x, y=y, name=name, mode="lines", row=row, col=1, line={"shape": "hv", "color": colour})
    for point, colour in zip(rivals, cycle(RIVALS), strict=False):
        figure.add_scatter(
            x=[x[0], x[-1]],
            y=[point.loss, point.loss],
            mode="lines",
            row=1,
            col=1,
            line={"dash": "dash", "color": colour, "width": 1.5},
            name=f"rival {escape(point.label)}",
        )
    figure.update_layout(**layout(480))
    figure.update_yaxes(title=f"inherited loss,<br>{unit}", row=1, col=1)
    figure.update_yaxes(title="hypervolume", row=2, col=1)
    figure.update_xaxes(title="architectures evaluated", row=2, col=1)
    return figure


def training_figure(curves: Sequence[Curve], unit: str) -> go.Figure:
    """Loss on training batches, in ``unit``: the supernet's slices dotted, retrained models solid."""
    figure = go.Figure()
    models = list(dict.fromkeys(curve.model for curve in curves if curve.model is not None))
    greys = iter(("#3e4c59", "#9aa5b1", "#c3cad3"))
    for curve in curves:
        style = (
            {"color": next(greys), "dash": "dot"}
            if curve.model is None
            else {"color": MODELS[models.index(curve.model) % len(MODELS)]}
        )
        figure.add_scatter(
            x=list(curve.steps),
            y=list(curve.losses),
            mode="lines",
            line={"width": 1.8, **style},
            name=escape(curve.label),
        )
    figure.update_layout(**layout(420))
    figure.update_yaxes(title=f"loss on a training batch, {unit}")
    figure.update_xaxes(title="steps")
    return figure


def breakdown_figure(models: Sequence[Model], context: Context) -> go.Figure:
    """Stacked bars of FLOPs per token by part, a panel per model on one scale."""
    titles = [f"{escape(model.name)}: {DIMENSIONS['flops'].format(model.costs['flops'])} per token" for model in models]
    figure = make_subplots(1, len(models), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.03)
    for column, model in enumerate(models, start=1):
        rows = breakdown(model, context)
        for part, colour in PARTS.items():
            figure.add_bar(
                x=[name for name, _ in rows],
                y=[parts.get(part, 0) for _, parts in rows],
                name=part,
                marker={"color": colour},
                legendgroup=part,
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_layout(**layout(420), barmode="stack", bargap=0.25)
    figure.update_annotations(font={"size": 13})
    figure.update_yaxes(title=axis_title("flops", context), col=1)
    figure.update_yaxes(tickformat="~s")
    figure.update_xaxes(title="layer", type="category")
    return figure


def latency_figure(measurements: Sequence[Measurement], context: Context) -> go.Figure:
    """Predicted against measured latency of everything the calibration measured."""
    figure = go.Figure()
    values = [value for row in measurements for value in (row.measured_ms, row.predicted_ms) if value > 0]
    ends = [min(values) * 0.8, max(values) * 1.25]
    figure.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        line={"color": MUTED, "dash": "dash", "width": 1},
        name="predicted = measured",
        hoverinfo="skip",
    )
    kinds = list(dict.fromkeys(row.kind for row in measurements))
    styles = {
        "held-out model": {"symbol": "star", "size": 13, "color": KINDS["best"]},
        "model": {"symbol": "circle", "size": 9, "color": KINDS["front"]},
    }
    for kind in sorted(kinds, key=list(styles).index):
        rows = [row for row in measurements if row.kind == kind]
        name = kind if kind == "held-out model" else f"{kind}, fitted"
        figure.add_scatter(
            x=[row.measured_ms for row in rows],
            y=[row.predicted_ms for row in rows],
            mode="markers",
            marker={"size": 7, **styles[kind]},
            name=f"{name} ({len(rows)})",
        )
    per = per_text("latency", context)
    figure.update_layout(**layout(480))
    ticks = {"type": "log", "tickvals": [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)], "tickformat": "~g"}
    figure.update_xaxes(title=f"measured, ms {per}", **ticks)
    figure.update_yaxes(title="predicted, ms", **ticks)
    return figure


def ranking_figure(members: Sequence[CheckedMember], unit: str) -> go.Figure:
    """Loss trained alone against inherited loss, both in ``unit``, of members that finished; the best one first."""
    figure = go.Figure()
    groups = (
        ("other trials", members[1:], {"symbol": "circle", "size": 9, "color": KINDS["front"]}),
        ("least inherited loss", members[:1], {"symbol": "star", "size": 16, "color": KINDS["best"]}),
    )
    for name, group, marker in groups:
        rows = [row for row in group if row.retrained_loss is not None]
        errors = {
            axis: {"type": "data", "array": [getattr(row, key) for row in rows], "thickness": 1, "width": 3}
            for axis, key in (("error_x", "inherited_standard_error"), ("error_y", "retrained_standard_error"))
        }
        figure.add_scatter(
            x=[row.inherited_loss for row in rows],
            y=[row.retrained_loss for row in rows],
            **errors,
            mode="markers",
            marker=marker,
            name=name,
            text=[
                f"trial {row.trial}<br>{DIMENSIONS['flops'].format(row.flops)} per token, "
                f"{DIMENSIONS['parameters'].format(row.parameters)} parameters"
                for row in rows
            ],
        )
    figure.update_layout(**layout(460))
    figure.update_xaxes(title=f"inherited validation loss, {unit}")
    figure.update_yaxes(title=f"validation loss trained alone,<br>{unit}")
    return figure


def _groups(points: Sequence[Point]) -> list[tuple[str, dict[str, Any], list[Point]]]:
    """Name, marker and points of each entry of the legend; a rival has its own, in the colour of its curves."""
    groups = []
    for kind, (name, marker) in _MARKERS.items():
        members = [point for point in points if point.kind == kind]
        if members:
            groups.append((f"{name} ({len(members)})", {"color": KINDS[kind], **marker}, members))
    rivals = [point for point in points if point.kind == "rival"]
    for rival, colour, symbol in zip(rivals, cycle(RIVALS), cycle(_RIVALS), strict=False):
        marker = {"color": colour, "symbol": symbol, "size": 11, "line": {"width": 2.5}}
        groups.append((f"rival {escape(rival.label)}", marker, [rival]))
    return groups


def layout(height: int) -> dict[str, Any]:
    return {
        "template": "plotly_white",
        "height": height,
        "margin": {"l": 70, "r": 20, "t": 50, "b": 50},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "legend": _LEGEND,
        "hovermode": "closest",
    }


def _cost_layout(cost: str, budget: Sequence[BudgetLine], context: Context) -> dict[str, Any]:
    """The parts that change with the cost on the x axis: its title and its budget line."""
    lines = [line for line in budget if line.cost == cost]
    return {
        "xaxis": {
            "title": {"text": axis_title(cost, context)},
            "tickformat": "~s" if cost != "latency" else "",
            "anchor": "free",
            "position": 0,
        },
        "shapes": [
            {
                "type": "line",
                "x0": line.limit,
                "x1": line.limit,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"color": INK, "dash": "dash", "width": 1.5},
            }
            for line in lines
        ],
        "annotations": [
            {
                "x": line.limit,
                "y": 1,
                "yref": "paper",
                "yanchor": "bottom",
                "showarrow": False,
                "text": limit_text(line.cost, line.limit, line.bind),
            }
            for line in lines
        ],
    }


def _line_data(points: Sequence[Point], cost: str) -> dict[str, list[float]]:
    line = front_line(points, cost)
    return {"x": [x for x, _ in line], "y": [y for _, y in line]}


def _hover(point: Point, context: Context, unit: str) -> str:
    """Loss, costs, and the architecture as text. Everything is escaped, because plotly reads a subset of HTML."""
    lines = [point.label]
    if point.loss is not None:
        error = "" if point.standard_error is None else f" ± {point.standard_error:.4f}"
        lines.append(f"loss ({unit}) {point.loss:.4f}{error}")
    lines += [
        f"{cost_name(cost)} {DIMENSIONS[cost].format(value)} {per_text(cost, context)}"
        for cost, value in sorted(point.costs.items(), key=lambda item: COSTS.index(item[0]))
    ]
    return "<br>".join(escape(line) for line in [*lines, *draw(point.architecture).split("\n")])
