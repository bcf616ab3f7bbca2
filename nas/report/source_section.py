"""The report's section on the trained model that a run starts from: how sparse it is, and what compressing it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moesaic.nas.report.colours import KINDS, MODELS, MUTED
from moesaic.nas.report.data import axis_title
from moesaic.nas.report.figures import layout
from moesaic.nas.report.html import paragraph, plot
from moesaic.nas.report.summary import Summary
from moesaic.search_spaces import Slot
from moesaic.search_spaces.architecture import layer_names
from moesaic.supernet.sparsify.activity import LayerActivity

_GRID = tuple(share / 16 for share in range(1, 17))
"""Shares of a layer's neurons at which kinds of parts are compared."""


@dataclass(frozen=True)
class PartError:
    """A feed-forward part that a layer may become: its ``kind``, the ``share`` of the layer's neurons that a token
    uses, and the squared ``error`` of its output as a share of the output's square."""

    slot: Slot
    kind: str
    share: float
    error: float


@dataclass(frozen=True)
class Sparsity:
    """What stage supernet found in the trained model."""

    activities: Sequence[LayerActivity]
    errors: Sequence[PartError]


def source_section(summary: Summary, sparsity: Sparsity) -> Iterator[str]:
    """The section's parts. The summary has a source."""
    yield "<h3>Quality against cost, as measured</h3>"
    yield plot("quality", quality_figure(summary))
    yield paragraph("Loss on the test split; costs on this device. Dense beside sparse: each point names its model.")
    yield "<h3>How sparse its layers are</h3>"
    yield plot("activity", activity_figure(sparsity.activities))
    yield paragraph(
        "The share of a layer's neurons (of its experts, in a mixture) that hold 95 % of what they contribute to a "
        "token's output, as a mean over tokens. The lower, the less is lost when a token uses few."
    )
    if any(layer.captured for layer in sparsity.activities):
        yield "<h3>How well the routers find what matters</h3>"
        yield plot("captured", captured_figure(sparsity.activities))
        yield paragraph(
            "The activation mass in the tiles of 16 neurons that a router chooses, before any neuron is shared, "
            "against the share that it chooses. Lines are means over layers, the band is from the worst layer to the "
            "best. A router that knew the masses would be on the upper line, one that guesses on the diagonal."
        )
    if sparsity.errors:
        yield "<h3>What each kind of layer loses</h3>"
        yield plot("errors", errors_figure(sparsity.errors))
        yield paragraph(
            "Squared error of a layer's output, without any repair, for the best part of each kind that uses at most "
            "this share of the layer's neurons; means over layers."
        )


def quality_figure(summary: Summary) -> go.Figure:
    """Test loss against FLOPs and, where it was measured, latency: the trained model, the searched one and rivals."""
    source, results = summary.source, [summary.chosen.retrained, *summary.rivals]
    assert source is not None
    costs = [cost for cost in ("flops", "latency") if cost in source.measured]
    figure = make_subplots(1, len(costs), shared_yaxes=True, horizontal_spacing=0.04)
    models = [("trained model", source, MUTED), *((r.name, r, c) for r, c in zip(results, MODELS, strict=False))]
    for column, cost in enumerate(costs, start=1):
        for name, model, colour in models:
            figure.add_scatter(
                x=[model.measured[cost]],
                y=[model.loss],
                mode="markers",
                marker={"size": 12, "color": colour, "symbol": "circle" if model is source else "diamond"},
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        title = axis_title(cost, summary.context).replace(" per ", "<br>per ")
        figure.update_xaxes(title=title, rangemode="tozero", row=1, col=column)
    figure.update_layout(**layout(440))
    figure.update_layout(legend={"y": -0.28})  # below titles of two lines
    figure.update_yaxes(title=f"test loss, {summary.unit}", col=1)
    return figure


def activity_figure(activities: Sequence[LayerActivity]) -> go.Figure:
    figure = go.Figure()
    figure.add_bar(
        x=list(layer_names(layer.slot for layer in activities).values()),
        y=[layer.activity.concentrated for layer in activities],
        marker={"color": KINDS["front"]},
    )
    figure.update_layout(**layout(340), bargap=0.25)
    figure.update_xaxes(title="layer", type="category")
    figure.update_yaxes(title="share that holds 95 %", tickformat=".0%", range=[0, 1])
    return figure


def captured_figure(activities: Sequence[LayerActivity]) -> go.Figure:
    """Mass in the chosen tiles against their share."""
    layers = [layer.captured for layer in activities if layer.captured]
    shares = [one.share for one in layers[0]]
    routed = np.array([[one.routed for one in layer] for layer in layers])
    best = np.array([[one.best for one in layer] for layer in layers])
    figure = go.Figure()
    band = [*routed.max(0), *routed.min(0)[::-1]]
    figure.add_scatter(
        x=[*shares, *shares[::-1]], y=band, mode="lines", fill="toself", line={"width": 0},
        fillcolor="rgba(213, 94, 0, 0.15)", name="router, all layers", hoverinfo="skip",
    )  # fmt: skip
    lines = (("the best choice", best.mean(0), MUTED), ("router, mean", routed.mean(0), KINDS["best"]))
    for name, values, colour in lines:
        figure.add_scatter(x=shares, y=values, mode="lines+markers", line={"color": colour}, name=name)
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": MUTED, "dash": "dash", "width": 1}, name="chance"
    )
    figure.update_layout(**layout(420))
    figure.update_xaxes(title="share of the tiles that a token uses", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(title="share of the activation mass", tickformat=".0%", range=[0, 1.02])
    return figure


def errors_figure(errors: Sequence[PartError]) -> go.Figure:
    figure = go.Figure()
    for kind in dict.fromkeys(error.kind for error in errors):
        points = error_curve([error for error in errors if error.kind == kind])
        figure.add_scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="lines+markers", name=kind)
    figure.update_layout(**layout(420))
    figure.update_xaxes(title="share of the layer's neurons that a token uses, at most", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(title="error of the output", tickformat=".0%", rangemode="tozero")
    return figure


def error_curve(errors: Sequence[PartError]) -> list[tuple[float, float]]:
    """(share, mean over layers of the least error of a part that uses at most it), where all layers have one."""
    slots = {error.slot for error in errors}
    curve = []
    for share in _GRID:
        least: dict[Slot, float] = {}
        for error in errors:
            if error.share <= share + 1e-9:
                least[error.slot] = min(error.error, least.get(error.slot, error.error))
        if len(least) == len(slots):
            curve.append((share, sum(least.values()) / len(least)))
    return curve
