"""Who competes under a budget: candidates of each kind, ranked by inherited loss, of which the first that keep the
budget when they are measured are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moesaic.nas.costs.compliance import worst_status
from moesaic.nas.costs.measure import latency_figures
from moesaic.nas.search.rivals import uniform_layouts
from moesaic.nas.stages.check_fidelity import run_fidelity
from moesaic.nas.stages.run import Run
from moesaic.nas.stages.run_search import inherited_loss, load_search, run_search_stage
from moesaic.nas.trust.correction import Correction, Judged
from moesaic.nas.trust.judges import correction_of, judged_trial
from moesaic.nas.trust.sentences import corrects
from moesaic.search_spaces import Architecture, MoesaicError
from moesaic.search_spaces.files import read_json
from moesaic.supernet import Evaluation, evaluate

COUNTS = {"searched": 3, "random": 1, "uniform": 3, "dense": 2}
"""Of each kind, how many are trained. The first ``searched`` one is what the tool ships."""
TRIES = 12
"""Most candidates of a kind that are measured to find so many."""
SCREEN_WINDOWS = 16
FINALISTS = 60

T = TypeVar("T")
Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    architecture: Architecture
    inherited_loss: float


def candidates(run: Run, kind: str, searched: Run) -> list[Candidate]:
    """The first of a kind, best first, by the judge that chooses the searched model: inherited loss, or that corrected
    by the trainings of the searched run's stage fidelity. ``run`` is that of the kind: it has the kind's sampler."""
    if kind in ("searched", "random"):
        run_search_stage(run)
        if kind == "searched":
            run_fidelity(run)
        judged = [judged_trial(trial) for trial in load_search(run)[0] if trial.feasible]
    else:
        layouts = [layout for layout in uniform_layouts(run.space, kind == "uniform") if run.budget.fits(layout)]
        run.reporter.say(f"{run.path.parent.name}: {len(layouts)} {kind} layouts inside the budget")
        few = run.windows("validation", SCREEN_WINDOWS)
        finalists = screened(layouts, lambda layout: evaluate(run.supernet, few, layout).loss)
        judge = inherited_loss(run)
        judged = [judged_layout(run, layout, judge(layout)) for layout in finalists]
    return distinct(ranked(judged, correction_by(searched)))[:TRIES]


def judged_layout(run: Run, layout: Architecture, evaluation: Evaluation) -> Judged:
    costs = run.pricer.measured(layout, evaluation.loads)
    return Judged(layout, evaluation.loss, costs["flops"], costs["parameters"])


def correction_by(run: Run) -> Correction | None:
    """The correction that a run's export follows; None where inherited losses decide."""
    check = read_json(run.stages["fidelity"].path / "fidelity.json")["check"]
    if check is None or not corrects(check["judges"]):
        return None
    return correction_of(load_search(run)[0], check["members"])


def ranked(judged: Sequence[Judged], correction: Correction | None) -> list[Candidate]:
    """Best first; of equal ones the one with fewer FLOPs."""
    marks = [one.loss for one in judged] if correction is None else correction(judged)
    order = sorted(zip(marks, judged, strict=True), key=lambda row: (row[0], row[1].flops))
    return [Candidate(one.architecture, one.loss) for _, one in order]


def distinct(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Without those that compute the same as an earlier one, which their equal losses tell: two experts under top-2,
    and under a threshold that always keeps both."""
    first: dict[float, Candidate] = {}
    for candidate in ranked:
        first.setdefault(candidate.inherited_loss, candidate)
    return list(first.values())


def screened(items: Sequence[T], rough: Callable[[T], float]) -> list[T]:
    """The best few by a rough judge."""
    return sorted(items, key=rough)[:FINALISTS]


def measured(run: Run, candidate: Candidate) -> Row:
    """What a candidate really costs on this device, with the supernet's weights, beside its budget."""
    architecture = candidate.architecture
    model = run.supernet.extract(architecture).eval()
    found = run.measure(model, run.windows("test", run.config.retrain.evaluation_windows))
    predicted = run.pricer.expected(architecture)["latency"]
    lines = run.budget_lines(architecture, found.costs)
    return {
        "fingerprint": architecture.fingerprint,
        "architecture": architecture.to_dict(),
        "inherited_loss": candidate.inherited_loss,
        "costs": found.costs,
        "latency": latency_figures(found.timing, predicted, run.predictor),
        "budget": lines,
        "status": worst_status(lines),
    }


def keeping(kind: str, ranked: Sequence[T], measure: Callable[[T], Row]) -> list[Row]:
    """The rows of the candidates that were measured, best first: those that are over the budget have ``rank`` None,
    the others have one from 1, until there are as many as are to be trained.

    Raises
    ------
    MoesaicError : none keeps the budget.
    """
    rows: list[Row] = []
    kept = 0
    for candidate in ranked:
        row = measure(candidate)
        kept += row["status"] != "over"
        rows.append({"kind": kind, "rank": None if row["status"] == "over" else kept, **row})
        if kept == COUNTS[kind]:
            break
    if not kept:
        raise MoesaicError(f"no {kind} candidate keeps the budget when measured", found=f"{len(rows)} candidates over")
    return rows
