"""Who competes under a budget: candidates of each kind, ranked by inherited loss, of which the first that keep the
budget when they are measured are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nas.compliance import worst_status
from nas.costs.measure import latency_figures
from nas.search.rivals import uniform_layouts
from nas.search.trials import Trial
from nas.stages.run import Run
from nas.stages.search import InheritedLoss, load_search, run_search_stage
from search_spaces import Architecture, MoesaicError
from supernet import evaluate

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


def candidates(run: Run, kind: str) -> list[Candidate]:
    """The first of a kind by inherited loss, best first. ``run`` is that of the kind: it has the kind's sampler."""
    if kind in ("searched", "random"):
        run_search_stage(run)
        ranked = by_loss(load_search(run)[0])
    else:
        layouts = [layout for layout in uniform_layouts(run.space, kind == "uniform") if run.budget.fits(layout)]
        run.reporter.say(f"{run.path.parent.name}: {len(layouts)} {kind} layouts inside the budget")
        judge, few = InheritedLoss(run), run.windows("validation", SCREEN_WINDOWS)
        found = screened(
            layouts, lambda layout: evaluate(run.supernet, few, layout).loss, lambda layout: judge(layout).loss
        )
        ranked = [Candidate(layout, loss) for layout, loss in found]
    return distinct(ranked)[:TRIES]


def distinct(ranked: Sequence[Candidate]) -> list[Candidate]:
    """Without those that compute the same as an earlier one, which their equal losses tell: two experts under top-2,
    and under a threshold that always keeps both."""
    first: dict[float, Candidate] = {}
    for candidate in ranked:
        first.setdefault(candidate.inherited_loss, candidate)
    return list(first.values())


def by_loss(trials: Sequence[Trial]) -> list[Candidate]:
    """Feasible trials, best first: in the order in which the tool's export tries them."""
    feasible = [(trial.loss, trial.values, trial.number, trial.architecture) for trial in trials if trial.feasible]
    ranked = sorted(feasible, key=lambda row: row[:3])
    return [Candidate(architecture, loss) for loss, _, _, architecture in ranked if loss is not None]


def screened(items: Sequence[T], rough: Callable[[T], float], judge: Callable[[T], float]) -> list[tuple[T, float]]:
    """Every item is judged roughly; the best are judged again, and ranked by that."""
    finalists = sorted(items, key=rough)[:FINALISTS]
    return sorted(((item, judge(item)) for item in finalists), key=lambda found: found[1])


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
