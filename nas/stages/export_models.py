"""Stage export: write the best architecture and a spread of the front as separate models, and check their budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.nas.costs.compliance import MeasuredLine, Refused, lines_over, lines_text, over_text, worst_excess
from moesaic.nas.costs.measure import MeasuredCosts
from moesaic.nas.exports.figures import BEST, INHERITED_BEST, ExportFigures
from moesaic.nas.exports.folder import export_model, retrain_settings, write_retrain_file
from moesaic.nas.search.loop import SearchResult
from moesaic.nas.search.pareto import evenly_spread
from moesaic.nas.search.trials import Trial
from moesaic.nas.stages.check_fidelity import load_trust
from moesaic.nas.stages.directory import StageDirectory, fingerprint
from moesaic.nas.stages.run import BudgetRun
from moesaic.nas.stages.run_search import load_search
from moesaic.nas.trust.scores import Scores
from moesaic.search_spaces.files import read_value, write_value
from moesaic.supernet import Evaluation, Transformer

_CANDIDATES = 8
"""Most trials that are measured to find one inside the budget on this device. If the first eight are all over, the
predictor is off, and a ninth would not help."""


@dataclass(frozen=True)
class Candidate:
    """A trial whose model was evaluated on the test split and measured, with its budget lines."""

    trial: Trial
    model: Transformer
    evaluation: Evaluation
    measured: MeasuredCosts
    lines: tuple[MeasuredLine, ...]

    def refused(self) -> Refused:
        trial = self.trial
        return Refused(trial.number, trial.architecture.fingerprint, trial.loss, lines_over(self.lines))


def inputs(part: BudgetRun) -> dict[str, Any]:
    config = part.run.config
    return {
        "export": config.export.model_dump(mode="json"),
        "evaluation_windows": config.retrain.evaluation_windows,
        "device": asdict(part.run.device),
        "context": asdict(part.run.context),
        "retrain_file": retrain_settings(config, part.run.task),
    }


def work(part: BudgetRun, directory: StageDirectory) -> str:
    """Writes a folder for ``best-inherited`` and each ``front-N``, and ``exports.json``. Stage retrain adds ``best``.

    ``best-inherited`` is the best-ranked trial that is inside the budget when measured. Members of the front that are
    over it are exported and flagged.
    """
    if (exports := _standing(directory)) is not None:  # only settings of retraining changed
        for name in {BEST, *(figures.name for figures in exports)}:
            if (directory.path / name / "retrain.yaml").exists():
                write_retrain_file(directory.path / name, part.run.config, part.run.task)
        return _digest(exports)
    trials, result = load_search(part)
    count = part.run.config.export.front
    with part.reporter.progress("export") as bar:
        bar.update(0, 1 + count, INHERITED_BEST)
        best, refused = choose_best(part, trials)
        exports = [_export(part, directory.path / INHERITED_BEST, best, refused)]
        known = {best.trial.number, *(candidate.trial for candidate in refused)}
        others = _spread_front(result, known, count)
        for place, trial in enumerate(others, start=1):
            name = f"front-{place}"
            bar.update(place, 1 + len(others), name)
            member = _measure(part, trial)
            exports.append(_export(part, directory.path / name, member, ()))
            if over := over_text(member.lines):
                part.reporter.say(f"export: {name} (trial {trial.number}) is {over}")
        bar.update(len(exports), len(exports))
    write_value(directory.path / "exports.json", exports, list[ExportFigures])
    return _digest(exports)


def _standing(directory: StageDirectory) -> list[ExportFigures] | None:
    """The exports of an earlier, complete stage in this folder."""
    path = directory.path / "exports.json"
    exports = read_value(path, list[ExportFigures]) if path.exists() else []
    whole = all((directory.path / figures.name / "config.json").exists() for figures in exports)
    return exports if exports and whole else None


def _digest(exports: list[ExportFigures]) -> str:
    """Measurements decide which trials are exported, so later stages depend on more than the inputs."""
    return fingerprint({figures.name: figures.fingerprint for figures in exports})


def load_exports(part: BudgetRun) -> list[ExportFigures]:
    """Figures of all exports, the chosen one first."""
    return read_value(part.folder("export").path / "exports.json", list[ExportFigures])


def choose_best(part: BudgetRun, trials: list[Trial]) -> tuple[Candidate, tuple[Refused, ...]]:
    """The first feasible trial that is inside the budget when measured, and those refused before it. Trials are ordered
    by inherited loss, or by corrected loss where the fidelity check found that better.

    If none of the first few is inside the budget, the one that exceeds it least is taken.
    """
    corrected = load_trust(part).corrected
    feasible = [trial for trial in trials if trial.feasible]
    order = sorted(feasible, key=lambda t: (corrected.get(t.number, t.loss), t.values, t.number))[:_CANDIDATES]
    over: list[Candidate] = []
    for trial in order:
        candidate = _measure(part, trial)
        if not lines_over(candidate.lines):
            if over:
                part.reporter.say(f"export: trial {trial.number} keeps the budget and is exported instead")
            return candidate, tuple(other.refused() for other in over)
        text = lines_text(lines_over(candidate.lines))
        part.reporter.say(f"export: trial {trial.number} is refused, over the budget when measured: {text}")
        over.append(candidate)
    least = min(over, key=lambda candidate: worst_excess(candidate.lines))
    part.reporter.say(
        f"export: none of {len(over)} candidates keeps the budget on this device; trial {least.trial.number}, which "
        f"exceeds it least, is exported and is {over_text(least.lines)}"
    )
    return least, tuple(candidate.refused() for candidate in over if candidate is not least)


def _spread_front(result: SearchResult, known: set[int], count: int) -> list[Trial]:
    """Members of the front to export besides the best, except those in ``known``: exported, or known to be over."""
    others = [trial for trial in result.front if trial.number not in known]
    if not others or not count:
        return []
    points = np.array([trial.values for trial in others])
    return [others[index] for index in evenly_spread(points, count)]


def _measure(part: BudgetRun, trial: Trial) -> Candidate:
    run = part.run
    run.check_stop("export")
    model = run.supernet.extract(trial.architecture).eval()
    judge = run.judge("test", run.config.retrain.evaluation_windows, model)
    evaluation = judge(trial.architecture)
    measured = part.measure(model, evaluation.loads, judge.batch)
    return Candidate(trial, model, evaluation, measured, part.measured_lines(trial.architecture, measured.costs))


def _export(part: BudgetRun, directory: Path, candidate: Candidate, refused: tuple[Refused, ...]) -> ExportFigures:
    run, trial, model = part.run, candidate.trial, candidate.model
    batch = run.task.held_out("test", 4)
    here = batch.to(run.device.torch_device)
    with torch.inference_mode():
        logits = (one(here.tokens, trial.architecture, **here.beside) for one in (run.supernet, model))
        difference = (next(logits) - next(logits)).abs().max().item()
    figures = ExportFigures(
        **vars(Scores.of(run.task, "test", model, candidate.evaluation)),
        name=directory.name,
        trial=trial.number,
        fingerprint=trial.architecture.fingerprint,
        weights="inherited from the supernet, not retrained",
        validation_loss=trial.loss,
        predicted=dict(run.pricer.expected(trial.architecture)),
        measured=candidate.measured.costs,
        latency=candidate.measured.latency,
        budget=candidate.lines,
        refused=refused,
        device=str(run.device),
        context=run.context,
        slice_max_logit_difference=difference,
    )
    return export_model(directory, model.cpu(), run.config, run.task, figures, batch)
