"""Everything a report shows of one run, gathered once from the artifacts of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nas.costs.context import Context
from nas.report.data import (
    Curve,
    Evaluated,
    Measurement,
    Model,
    Point,
    RoutingError,
    pareto_points,
    read_measurements,
    routing_error,
    search_history,
    training_curves,
)
from nas.search.budget import BudgetLine
from nas.search.loop import SearchResult
from nas.search.trials import Trial
from nas.stages.retrain import SEARCHED
from nas.stages.run import Run
from nas.stages.search import load_search
from search_spaces import Architecture
from search_spaces.files import read_json


@dataclass(frozen=True)
class Findings:
    """``models`` are the searched one and its rivals, ``exported`` the other exported members of the front."""

    summary: dict[str, Any]
    configuration: str
    context: Context
    objectives: tuple[str, ...]
    budget: tuple[BudgetLine, ...]
    result: SearchResult
    points: list[Point]
    history: list[Evaluated]
    models: list[Model]
    exported: list[Model]
    curves: list[Curve]
    measurements: list[Measurement]
    routing: RoutingError | None

    @property
    def default_cost(self) -> str:
        """The cost that pictures show first: the first objective beside the loss."""
        return next((name for name in self.objectives if name != "loss"), "flops")


def gather(run: Run, summary: dict[str, Any]) -> Findings:
    trials, result = load_search(run)
    by_number = {trial.number: trial for trial in trials}
    exports = {row["trial"]: row["name"] for row in read_json(run.stages["export"].path / "exports.json")}
    rivals = [
        Point("rival", rival["kind"].replace(" ", "-"), architecture, run.pricer.expected(architecture), rival["loss"])
        for rival in read_json(run.stages["search"].path / "rivals.json")
        for architecture in (Architecture.from_dict(rival["architecture"]),)
    ]
    retrained = [summary["chosen"]["retrained"], *summary["rivals"]]
    return Findings(
        summary=summary,
        configuration=(run.path / "config.yaml").read_text(encoding="utf-8"),
        context=run.context,
        objectives=tuple(run.config.search.objectives),
        budget=run.budget.lines,
        result=result,
        points=pareto_points(trials, result, exports, rivals),
        history=search_history(trials),
        models=[
            _model(run, SEARCHED, result.best.architecture),
            *(_model(run, rival.label, rival.architecture) for rival in rivals),
        ],
        exported=_exported(run, exports, by_number, result),
        curves=training_curves(
            run.stages["supernet"].path, {row["name"]: run.stages["retrain"].path / row["name"] for row in retrained}
        ),
        measurements=read_measurements(run.stages["latency"].path / "measurements.csv"),
        routing=routing_error(trials, run.pricer),
    )


def _exported(run: Run, exports: dict[int, str], trials: dict[int, Trial], result: SearchResult) -> list[Model]:
    others = [(name, trials[number]) for number, name in exports.items() if number != result.best.number]
    return [_model(run, name, trial.architecture) for name, trial in others]


def _model(run: Run, name: str, architecture: Architecture) -> Model:
    return Model(name, architecture, tuple(run.pricer.expected_uses(architecture)), run.pricer.expected(architecture))
