"""The models compared under a budget: candidates of each kind are ranked by inherited loss, and the first that keep the
budget when measured are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from experiments.common import Row, do_stage
from moesaic import (
    Architecture,
    BudgetRun,
    Correction,
    Evaluation,
    Judged,
    MoesaicError,
    Trial,
    correction_of,
    load_search,
    load_trust,
    uniform_layouts,
    worst_status,
)

COUNTS = {"searched": 3, "random": 1, "uniform": 3, "dense": 2}
"""How many models of each kind are trained. The first ``searched`` one is what the tool exports."""
SEARCHES = ("searched", "random")
TRIES = 12
"""Largest number of candidates of a kind that are measured to find these."""
SCREEN_WINDOWS = 16
FINALISTS = 60

T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    architecture: Architecture
    inherited_loss: float


def search(part: BudgetRun, kind: str) -> None:
    """Run the stages that a kind's candidates need: a search, and for the searched ones the check of its ranking."""
    if kind in SEARCHES:
        do_stage(part.run, "search")
    if kind == "searched":
        do_stage(part.run, "fidelity")


def candidates(part: BudgetRun, kind: str, searched: BudgetRun) -> list[Candidate]:
    """The best candidates of a kind, best first, by the judge that chooses the searched model: inherited loss, or
    that corrected by the searched run's stage fidelity. ``part`` is the run of the kind, with its sampler."""
    if kind in SEARCHES:
        judged = [judged_trial(trial) for trial in load_search(part)[0] if trial.feasible]
    else:
        run = part.run
        layouts = [layout for layout in uniform_layouts(run.space, kind == "uniform") if part.budget.fits(layout)]
        run.reporter.say(f"{part.path.parent.name}: {len(layouts)} {kind} layouts inside the budget")
        rough = run.judge("validation", SCREEN_WINDOWS)
        judge = run.judge("validation", run.config.search.evaluation_windows)
        finalists = screened(layouts, lambda layout: rough(layout).loss)
        judged = [judged_layout(part, layout, judge(layout)) for layout in finalists]
    return distinct(ranked(judged, correction_by(searched)))[:TRIES]


def judged_trial(trial: Trial) -> Judged:
    assert trial.loss is not None, "a feasible trial was evaluated"
    return Judged(trial.architecture, trial.loss, trial.costs["flops"], trial.costs["parameters"])


def judged_layout(part: BudgetRun, layout: Architecture, evaluation: Evaluation) -> Judged:
    costs = part.run.pricer.measured(layout, evaluation.loads)
    return Judged(layout, evaluation.loss, costs["flops"], costs["parameters"])


def correction_by(searched: BudgetRun) -> Correction | None:
    """The correction that a run's export uses; None if it uses inherited losses."""
    trust = load_trust(searched)
    if trust.check is None or not trust.corrected:
        return None
    return correction_of(load_search(searched)[0], trust.check.members)


def ranked(judged: Sequence[Judged], correction: Correction | None) -> list[Candidate]:
    """Best first; ties go to fewer FLOPs."""
    marks = [one.loss for one in judged] if correction is None else correction(judged)
    order = sorted(zip(marks, judged, strict=True), key=lambda row: (row[0], row[1].flops))
    return [Candidate(one.architecture, one.loss) for _, one in order]


def distinct(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Without candidates that compute the same as an earlier one, recognised by equal losses: two experts under top-2,
    and under a threshold that always keeps both."""
    first: dict[float, Candidate] = {}
    for candidate in ranked:
        first.setdefault(candidate.inherited_loss, candidate)
    return list(first.values())


def screened(items: Sequence[T], rough: Callable[[T], float]) -> list[T]:
    """The best few by a rough judge."""
    return sorted(items, key=rough)[:FINALISTS]


def measured(part: BudgetRun, candidate: Candidate) -> Row:
    """Measured costs of a candidate on this device, with the supernet's weights, beside its budget."""
    architecture, run = candidate.architecture, part.run
    model = run.supernet.extract(architecture).eval()
    judge = run.judge("test", run.config.retrain.evaluation_windows, model)
    found = part.measure(model, judge(architecture).loads, judge.batch)
    lines = part.measured_lines(architecture, found.costs)
    return {
        "fingerprint": architecture.fingerprint,
        "architecture": architecture.to_dict(),
        "inherited_loss": candidate.inherited_loss,
        "costs": found.costs,
        "latency": found.latency and asdict(found.latency),
        "budget": [asdict(line) for line in lines],
        "status": worst_status(lines),
    }


def keeping(kind: str, ranked: Sequence[T], measure: Callable[[T], Row]) -> list[Row]:
    """The rows of the measured candidates, best first. Those over the budget have ``rank`` None; the others count from
    1 to the number that is trained.

    Raises
    ------
    MoesaicError : no candidate keeps the budget.
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
