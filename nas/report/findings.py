"""Everything a report shows about one run, as the stage gathers it from the artifacts."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.nas.context import Context
from moesaic.nas.exports.figures import ExportFigures
from moesaic.nas.report.data import Curve, Evaluated, Measurement, Model, Point
from moesaic.nas.report.source_section import Sparsity
from moesaic.nas.report.summary import Summary
from moesaic.nas.search.budget import BudgetLine
from moesaic.nas.search.loop import SearchResult


@dataclass(frozen=True)
class Findings:
    """``models`` are the searched one and its rivals, ``exported`` the other exported members of the front, ``exports``
    the figures of all exports, the chosen one first. ``sparsity`` is that of the trained model a run starts from."""

    summary: Summary
    configuration: str
    context: Context
    objectives: tuple[str, ...]
    budget: tuple[BudgetLine, ...]
    result: SearchResult
    points: list[Point]
    history: list[Evaluated]
    models: list[Model]
    exported: list[Model]
    exports: list[ExportFigures]
    curves: list[Curve]
    measurements: list[Measurement]
    sparsity: Sparsity | None

    @property
    def default_cost(self) -> str:
        """The cost that pictures show first: the first objective besides the loss."""
        return next((name for name in self.objectives if name != "loss"), "flops")
