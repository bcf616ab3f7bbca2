"""Stage export: the best architecture and a spread of the front as models of their own, measured against the budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.nas.costs.compliance import lines_over, lines_text, over_text, worst_excess
from moesaic.nas.costs.latency.probe import autocast
from moesaic.nas.costs.measure import MeasuredCosts, latency_figures
from moesaic.nas.exports.folder import BEST, export_model
from moesaic.nas.search.loop import SearchResult
from moesaic.nas.search.pareto import spread
from moesaic.nas.search.trials import Trial
from moesaic.nas.stages.check_fidelity import load_judged
from moesaic.nas.stages.directory import fingerprint
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.run_search import load_search
from moesaic.nas.training.single import loss_figures
from moesaic.search_spaces.files import write_json, write_text
from moesaic.supernet import Transformer, evaluate

_CANDIDATES = 8
"""Most trials that are measured to find one that keeps the budget on this device: a search whose first eight are all
over has a predictor that is off, which a ninth does not mend."""


@dataclass(frozen=True)
class Candidate:
    """A trial whose model was measured, with its budget lines."""

    trial: Trial
    measured: MeasuredCosts
    lines: list[dict[str, Any]]


def run_export(run: Run) -> None:
    """Leaves a folder for ``best`` and each ``front-N``, and ``exports.json``.

    ``best`` is the trial judged best that keeps the budget when it is measured. Members of the front that
    do not keep it are exported and flagged.
    """
    with run.work("export") as stage:
        if stage is None:
            return
        trials, result = load_search(run)
        with run.task("export") as task:
            task.update(0, 1 + run.config.export.front, BEST)
            best, refused = choose_best(run, trials)
            rows = [_export(run, stage.path / BEST, best, refused)]
            others = _spread_front(result, {best.trial.number, *(row["trial"] for row in refused)}, run)
            for place, trial in enumerate(others, start=1):
                name = f"front-{place}"
                task.update(place, 1 + len(others), name)
                member = _measure(run, trial)
                rows.append(_export(run, stage.path / name, member, []))
                if over := over_text(member.lines):
                    run.reporter.say(f"export: {name} (trial {trial.number}) is {over}")
            task.update(len(rows), len(rows))
        write_json(stage.path / "exports.json", rows)
        # Which trials are exported follows from measurements, so what comes later depends on more than the inputs.
        write_text(stage.path / "digest", fingerprint({row["name"]: row["fingerprint"] for row in rows}))


def choose_best(run: Run, trials: list[Trial]) -> tuple[Candidate, list[dict[str, Any]]]:
    """The first feasible trial that is not over a budget line when measured, and those refused. Their order is that of
    the inherited losses, or of the corrected ones where the check of the ranking found those better.

    Where none of the first few keeps the budget it is the one that exceeds it least. A refused one is
    ``{trial, fingerprint, validation_loss, over}``, with the budget lines that it breaks.
    """
    judged = load_judged(run)
    feasible = [trial for trial in trials if trial.feasible]
    order = sorted(feasible, key=lambda t: (judged.get(str(t.number), t.loss), t.values, t.number))[:_CANDIDATES]
    refused: list[Candidate] = []
    for trial in order:
        candidate = _measure(run, trial)
        if not lines_over(candidate.lines):
            if refused:
                run.reporter.say(f"export: trial {trial.number} keeps the budget and is exported instead")
            return candidate, list(map(_refusal, refused))
        text = lines_text(lines_over(candidate.lines))
        run.reporter.say(f"export: trial {trial.number} is refused, over the budget when measured: {text}")
        refused.append(candidate)
    least = min(refused, key=lambda candidate: worst_excess(candidate.lines))
    run.reporter.say(
        f"export: none of {len(refused)} candidates keeps the budget on this device; trial {least.trial.number}, which "
        f"exceeds it least, is exported and is {over_text(least.lines)}"
    )
    return least, [_refusal(candidate) for candidate in refused if candidate is not least]


def _refusal(candidate: Candidate) -> dict[str, Any]:
    trial = candidate.trial
    return {
        "trial": trial.number,
        "fingerprint": trial.architecture.fingerprint,
        "validation_loss": trial.loss,
        "over": lines_over(candidate.lines),
    }


def _spread_front(result: SearchResult, known: set[int], run: Run) -> list[Trial]:
    """Members of the front to export beside the best; not those in ``known``: exported, or known to be over."""
    others = [trial for trial in result.front if trial.number not in known]
    if not others or not run.config.export.front:
        return []
    points = np.array([trial.values for trial in others])
    return [others[index] for index in spread(points, run.config.export.front)]


def _measure(run: Run, trial: Trial) -> Candidate:
    model = run.supernet.extract(trial.architecture).eval()
    measured = run.measure(model, run.windows("test", run.config.retrain.evaluation_windows))
    return Candidate(trial, measured, run.budget_lines(trial.architecture, measured.costs))


def _export(run: Run, directory: Path, candidate: Candidate, refused: list[dict[str, Any]]) -> dict[str, Any]:
    trial = candidate.trial
    model = run.supernet.extract(trial.architecture).eval()
    windows = run.windows("test", run.config.retrain.evaluation_windows)
    with autocast(run.device):
        evaluation = evaluate(model, windows)
    predicted = dict(run.pricer.expected(trial.architecture))
    tokens = windows[:4, :-1].to(run.device.torch_device)
    with torch.inference_mode():
        difference = (run.supernet(tokens, trial.architecture) - model(tokens)).abs().max().item()
    figures = {
        "name": directory.name,
        "trial": trial.number,
        "fingerprint": trial.architecture.fingerprint,
        "weights": "inherited from the supernet, not retrained",
        "validation_loss": trial.loss,
        **loss_figures(run.corpus, evaluation),
        "predicted": predicted,
        "measured": candidate.measured.costs,
        "latency": latency_figures(candidate.measured.timing, predicted["latency"], run.predictor),
        "budget": candidate.lines,
        "refused": refused,
        "device": str(run.device),
        "context": asdict(run.context),
        "slice_max_logit_difference": difference,
    }
    exported = Transformer(trial.architecture, run.corpus.vocab_size)
    exported.load_state_dict(model.state_dict())
    export_model(directory, exported.eval(), run.config, run.corpus.tokenizer_path, figures, windows)
    return figures
