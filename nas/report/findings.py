"""Everything a report shows of one run, gathered once from the artifacts of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesaic.nas.context import Context
from moesaic.nas.exports.folder import BEST
from moesaic.nas.report.data import (
    Curve,
    Evaluated,
    Measurement,
    Model,
    Point,
    pareto_points,
    read_measurements,
    search_history,
    training_curves,
)
from moesaic.nas.search.budget import BudgetLine
from moesaic.nas.search.loop import SearchResult
from moesaic.nas.stages.check_fidelity import load_rivals
from moesaic.nas.stages.retrain_models import SEARCHED
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.run_search import load_search
from moesaic.nas.training.single import seed_directory
from moesaic.search_spaces import Architecture
from moesaic.search_spaces.files import read_json


@dataclass(frozen=True)
class Findings:
    """``models`` are the searched one and its rivals, ``exported`` the other exported members of the front, ``exports``
    the figures of all that were exported, the chosen one first."""

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
    exports: list[dict[str, Any]]
    curves: list[Curve]
    measurements: list[Measurement]

    @property
    def default_cost(self) -> str:
        """The cost that pictures show first: the first objective beside the loss."""
        return next((name for name in self.objectives if name != "loss"), "flops")


def gather(run: Run, summary: dict[str, Any]) -> Findings:
    trials, result = load_search(run)
    by_number = {trial.number: trial for trial in trials}
    rows = read_json(run.stages["export"].path / "exports.json")
    exports = {row["trial"]: row["name"] for row in rows}
    chosen = summary["chosen"]
    rivals = [
        Point("rival", rival["kind"], architecture, run.pricer.expected(architecture), rival["loss"])
        for rival in load_rivals(run)
        for architecture in (Architecture.from_dict(rival["architecture"]),)
    ]
    retrained = [chosen["retrained"], *summary["rivals"]]
    folder = run.stages["retrain"].path
    first_seeds = {row["name"]: seed_directory(folder / row["name"], row["runs"][0]["seed"]) for row in retrained}
    return Findings(
        summary=summary,
        configuration=(run.path / "config.yaml").read_text(encoding="utf-8"),
        context=run.context,
        objectives=tuple(run.config.search.objectives),
        budget=run.budget.lines,
        result=result,
        points=pareto_points(trials, result, exports, rivals, {row["trial"] for row in chosen["refused"]}),
        history=search_history(trials),
        models=[
            _model(run, SEARCHED, Architecture.from_dict(chosen["architecture"])),
            *(_model(run, rival.label, rival.architecture) for rival in rivals),
        ],
        exported=[_model(run, name, by_number[n].architecture) for n, name in exports.items() if name != BEST],
        exports=rows,
        curves=training_curves(run.stages["supernet"].path, first_seeds),
        measurements=read_measurements(run.stages["latency"].path / "measurements.csv"),
    )


def _model(run: Run, name: str, architecture: Architecture) -> Model:
    return Model(name, architecture, tuple(run.pricer.expected_uses(architecture)), run.pricer.expected(architecture))
