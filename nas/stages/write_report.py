"""Stage report: write the summary of a run, the page and its pictures, from the artifacts of the other stages."""

from __future__ import annotations

import datetime
from typing import Any

from moesaic.nas.device import versions
from moesaic.nas.exports.figures import BEST, INHERITED_BEST
from moesaic.nas.report.data import (
    Model,
    Point,
    pareto_points,
    read_measurements,
    search_history,
    training_curves,
)
from moesaic.nas.report.findings import Findings
from moesaic.nas.report.source_section import PartError, Sparsity
from moesaic.nas.report.summary import Chosen, PredictorFigures, Summary
from moesaic.nas.search.loop import SearchFigures
from moesaic.nas.stages.check_fidelity import load_trust
from moesaic.nas.stages.directory import StageDirectory
from moesaic.nas.stages.export_models import load_exports
from moesaic.nas.stages.provenance import SUMMARY, OwnFiles
from moesaic.nas.stages.retrain_models import SEARCHED, load_results, load_source, seed_directory
from moesaic.nas.stages.run import BudgetRun
from moesaic.nas.stages.run_search import load_search, search_folder, write_front
from moesaic.nas.stages.split_model import load_sparsity
from moesaic.nas.stages.stage import STAGES
from moesaic.search_spaces import Architecture, FeedForward, draw
from moesaic.search_spaces.files import read_json, read_value, value_text, write_text


def inputs(part: BudgetRun) -> dict[str, Any]:
    run, settings = part.run, part.run.config.model_dump(mode="json")  # the page shows all of them
    if part.name:
        settings |= {"budget": settings["budgets"][part.name], "budgets": {}}
    return settings | {"device_name": str(run.device), "versions": versions()}


def work(part: BudgetRun, directory: StageDirectory) -> None:
    """Writes ``summary.json`` beside the stages, and ``index.html`` and ``pareto.png``, ``.svg`` and ``.csv``."""
    # Imported here: plotly and matplotlib take longer to import than most commands take to run.
    from moesaic.nas.report.page import build_page
    from moesaic.nas.report.paper import write_paper_figures

    summary = build_summary(part)
    write_summary(part, summary)
    findings = gather(part, summary)
    write_front(directory.path / "pareto.csv", findings.result)
    write_paper_figures(
        directory.path, findings.points, findings.budget, findings.context, findings.default_cost, summary.judged_in
    )
    write_text(directory.path / "index.html", build_page(findings))


def write_summary(part: BudgetRun, summary: Summary) -> None:
    OwnFiles(part.path).write(SUMMARY, value_text(summary))


def load_summary(part: BudgetRun) -> Summary:
    return read_value(part.path / SUMMARY, Summary)


def build_summary(part: BudgetRun) -> Summary:
    """Everything the run found for a budget, from its artifacts."""
    run, exports, results = part.run, load_exports(part), load_results(part)
    inherited, chosen = exports[0], results[0]
    folders = {stage.name: part.folder(stage.name) for stage in STAGES}
    predictor = run.predictor
    return Summary(
        name=run.config.name,
        date=datetime.date.today().isoformat(),
        seed=run.config.seed,
        device=str(run.device),
        versions=versions(),
        metrics=run.metrics,
        budget=chosen.budget,
        chosen=Chosen(
            fingerprint=chosen.fingerprint,
            architecture=chosen.architecture,
            picture=tuple(draw(chosen.architecture).split("\n")),
            inherited=inherited,
            predicted=chosen.predicted,
            measured=chosen.measured,
            refused=inherited.refused,
            latency=chosen.latency,
            retrained=chosen,
        ),
        rivals=tuple(results[1:]),
        search=read_value(search_folder(part) / "search.json", SearchFigures),
        supernet=read_json(part.folder("supernet").path / "evaluation.json"),
        latency_predictor=predictor and PredictorFigures(predictor.accuracy, predictor.describe()),
        trust=load_trust(part),
        exports=(BEST, *(figures.name for figures in exports)),
        stage_seconds={name: folder.artifact().seconds for name, folder in folders.items() if folder.complete},
        context=run.context,
        more_seeds=run.command("run", "retrain.seeds=3"),
        source=load_source(part),
        unit=run.task.unit,
        judged_in=run.judged_in,
    )


def gather(part: BudgetRun, summary: Summary) -> Findings:
    """The values that the page and the pictures show."""
    run, (trials, result), exports = part.run, load_search(part), load_exports(part)
    by_number = {trial.number: trial for trial in trials}
    names = {figures.trial: figures.name for figures in exports}
    rivals = [
        Point("rival", rival.kind, rival.architecture, run.pricer.expected(rival.architecture), rival.loss)
        for rival in summary.trust.chosen_rivals
    ]
    folder = part.folder("retrain").path
    retrained = [summary.chosen.retrained, *summary.rivals]
    first_seeds = {model.name: seed_directory(folder / model.name, model.runs[0].seed) for model in retrained}
    return Findings(
        summary=summary,
        configuration=run.loaded.resolved_yaml(part.name),
        context=run.context,
        objectives=tuple(run.config.search.objectives),
        budget=part.budget.lines,
        result=result,
        points=pareto_points(trials, result, names, rivals, {refused.trial for refused in summary.chosen.refused}),
        history=search_history(trials),
        models=[
            _model(part, SEARCHED, summary.chosen.architecture),
            *(_model(part, rival.label, rival.architecture) for rival in rivals),
            *([_model(part, "trained model", run.space.source)] if run.space.source else []),
        ],
        exported=[
            _model(part, name, by_number[number].architecture)
            for number, name in names.items()
            if name != INHERITED_BEST
        ],
        exports=exports,
        curves=training_curves(part.folder("supernet").path, first_seeds),
        sparsity=_sparsity(part),
        measurements=read_measurements(part.folder("latency").path / "measurements.csv") if run.predictor else [],
    )


def _sparsity(part: BudgetRun) -> Sparsity | None:
    """What the stage that split the trained model found in it; None where the run starts from random weights."""
    source = part.run.space.source
    if source is None:
        return None
    activities, scores = load_sparsity(part.run)
    errors = []
    for score in scores.parts:
        choice, whole = score.part, source.layers[score.slot].feed_forward
        if not isinstance(choice, FeedForward) or not choice.experts:
            continue
        if choice.router is None or choice.router.kind == "top_k":  # how many a threshold keeps, the text decides
            kind = f"experts of {choice.expert_sizes[0]}" if choice.router else "dense, pruned"
            share = choice.worst_active_neurons / whole.worst_active_neurons
            errors.append(PartError(score.slot, kind, share, score.error))
    return Sparsity(activities, errors)


def _model(part: BudgetRun, name: str, architecture: Architecture) -> Model:
    pricer = part.run.pricer
    return Model(name, architecture, tuple(pricer.expected_uses(architecture)), pricer.expected(architecture))
