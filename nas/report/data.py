"""The data behind a report's pictures: pure functions from a run's artifacts to plain values, drawn elsewhere."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesaic.nas.context import Context
from moesaic.nas.costs.analytic import flops_breakdown
from moesaic.nas.costs.compliance import MeasuredLine, margin_text, worst_status
from moesaic.nas.costs.price import Costs
from moesaic.nas.costs.use import LayerUse
from moesaic.nas.exports.figures import INHERITED_BEST
from moesaic.nas.search.loop import SearchResult, hypervolume_history
from moesaic.nas.search.pareto import non_dominated
from moesaic.nas.search.trials import Trial
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, Damaged
from moesaic.search_spaces.architecture import layer_names
from moesaic.supernet.metrics import read_metrics

COSTS = tuple(DIMENSIONS)
ON_FRONT = ("front", "exported", "best")
"""Kinds of points on the Pareto front; the best may be behind it, where members were refused for export."""


@dataclass(frozen=True)
class Point:
    """One architecture in a plot of loss against cost. ``kind`` is a key of ``colours.KINDS`` or ``rival``."""

    kind: str
    label: str
    architecture: Architecture
    costs: Costs
    loss: float | None = None
    standard_error: float | None = None


@dataclass(frozen=True)
class Model:
    """An architecture with the load it is priced under."""

    name: str
    architecture: Architecture
    uses: tuple[LayerUse, ...]
    costs: Costs


@dataclass(frozen=True)
class Evaluated:
    """A search after one more evaluation. ``best`` is the lowest loss inside the budget so far, or None."""

    evaluations: int
    best: float | None
    hypervolume: float


@dataclass(frozen=True)
class Curve:
    """Loss on training batches. ``model`` is None for the supernet, whose curves show its slices."""

    label: str
    model: str | None
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """A model that the latency calibration measured; a ``held-out model`` was not used in the fit."""

    kind: str
    measured_ms: float
    predicted_ms: float


def batch_text(context: Context) -> str:
    return f"batch of {context}".replace(" x ", " × ")


def cost_name(cost: str) -> str:
    return DIMENSIONS[cost].unit if DIMENSIONS[cost].unit.lower() == cost else cost.replace("_", " ")


def per_text(cost: str, context: Context) -> str:
    """What ``cost`` is per, with the batch spelled out."""
    return re.sub(r"\bbatch\b", batch_text(context), DIMENSIONS[cost].per)


def axis_title(cost: str, context: Context) -> str:
    """Quantity, unit, and what it is per."""
    parts = dict.fromkeys((cost_name(cost), DIMENSIONS[cost].unit))
    return f"{', '.join(filter(None, parts))} {per_text(cost, context)}"


def limit_text(cost: str, limit: float, bind: str) -> str:
    worst = ", worst case" if bind == "worst" else ""
    return f"budget {DIMENSIONS[cost].format(limit)}{worst}"


def pareto_points(
    trials: Sequence[Trial],
    result: SearchResult,
    exports: Mapping[int, str],
    rivals: Iterable[Point],
    refused: Collection[int] = (),
) -> list[Point]:
    """Every architecture of a search once, by outcome, and the rivals.

    ``exports`` names exported trials by number; ``refused`` are those that were over budget when measured for export.
    Duplicates are left out, because their trial is there already, and so are failed trials, which have no loss.
    """
    front = {trial.number for trial in result.front}
    unevaluated: dict[str, Point] = {}
    points: list[Point] = []
    for trial in trials:
        costs = trial.costs
        over = ", ".join(cost_name(cost) for cost, excess in trial.excess.items() if excess > 0)
        label = f"trial {trial.number}" + (f", over budget: {over}" if over else "")
        if trial.state == "refused":
            unevaluated.setdefault(trial.architecture.fingerprint, Point("refused", label, trial.architecture, costs))
        elif trial.state == "evaluated":
            if trial.number in exports:
                kind = "best" if exports[trial.number] == INHERITED_BEST else "exported"
                label = f"{label}, exported as {exports[trial.number]}"
            elif trial.number in front:
                kind = "front"
            else:
                kind = "evaluated" if trial.feasible else "over"
            if trial.number in refused:
                label = f"{label}, over budget when its model was measured"
            points.append(Point(kind, label, trial.architecture, costs, trial.loss, trial.standard_error))
    return [*unevaluated.values(), *points, *rivals]


def front_line(points: Sequence[Point], cost: str) -> list[tuple[float, float]]:
    """(cost, loss) of the front members that are not dominated in these two, by rising cost.

    With more than these two objectives, a member of the front may be dominated in this plane.
    """
    members = [p for p in points if p.kind in ON_FRONT and p.loss is not None]
    plane = np.array([(p.costs[cost], p.loss) for p in members])
    return sorted({(float(x), float(y)) for x, y in plane[non_dominated(plane)]})


def search_history(trials: list[Trial]) -> list[Evaluated]:
    """Best loss and hypervolume after every evaluation."""
    history, best = [], None
    evaluated = (trial for trial in trials if trial.state in ("evaluated", "failed"))
    for trial, (evaluations, volume) in zip(evaluated, hypervolume_history(trials), strict=True):
        if trial.feasible and trial.loss is not None:
            best = trial.loss if best is None else min(best, trial.loss)
        history.append(Evaluated(evaluations, best, volume))
    return history


def breakdown(model: Model, context: Context) -> list[tuple[str, dict[str, float]]]:
    """FLOPs per token by part: one row per layer, the vocabulary layer last."""
    layers, vocabulary = flops_breakdown(model.architecture, model.uses, context)
    rows = [(name, layers[slot]) for slot, name in layer_names(layers).items()]
    return [*rows, ("vocabulary", {"vocabulary": float(vocabulary)})]


def training_curves(supernet: Path, retrained: Mapping[str, Path]) -> list[Curve]:
    """Curves of the supernet (its largest slice first, then random ones) and of each retrained model, from the folders
    with their metrics."""
    curves = [_curve("supernet, slices", None, supernet)]
    curves += [_curve(name, name, path) for name, path in retrained.items()]
    return [curve for curve in curves if curve.steps]


def _curve(label: str, model: str | None, folder: Path) -> Curve:
    records = read_metrics(folder / "metrics.jsonl")
    return Curve(label, model, tuple(int(r["step"]) for r in records), tuple(r["loss"] for r in records))


def read_measurements(path: Path) -> list[Measurement]:
    """The calibration's measurements of the latency stage. Raises Damaged for a missing or damaged file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if rows.fieldnames is None:
                raise ValueError("an empty file")
            return [Measurement(row["kind"], float(row["measured_ms"]), float(row["predicted_ms"])) for row in rows]
    except FileNotFoundError:
        raise Damaged("no such file", path) from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise Damaged("is damaged: not a table of measurements", path) from None


def budget_text(lines: Sequence[MeasuredLine]) -> str:
    """A model's budget status: ``inside``, or its lines with the worst status and by how much each is over."""
    status = worst_status(lines)
    if status == "inside":
        return status
    parts = [f"{cost_name(line.name)} {margin_text(line)}" for line in lines if line.status == status]
    return "; ".join(parts) + (", within tolerance" if status == "within tolerance" else "")
