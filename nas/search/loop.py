"""The search itself: propose, evaluate, log; and what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nas.config import SearchConfig
from nas.search.budget import Budget
from nas.search.pareto import hypervolume, non_dominated
from nas.search.proposal import Sampler
from nas.search.trials import Trial, TrialLog
from search_spaces import Architecture, Interrupted
from supernet.evaluate import Evaluation


@dataclass(frozen=True)
class SearchResult:
    """``front``: feasible trials no other one dominates, by rising loss. ``best``: the one of least loss."""

    front: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        return self.front[0]


def run_search(
    config: SearchConfig,
    budget: Budget,
    sampler: Sampler,
    evaluate: Callable[[Architecture], Evaluation],
    log: TrialLog,
    on_trial: Callable[[list[Trial]], None] = lambda trials: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Evaluate until ``log`` holds ``config.trials`` evaluations, or no new architecture is found inside the budget.

    Raises
    ------
    Interrupted : after ``should_stop``; everything finished is in the log.
    """
    sampler.observe(log.trials)
    seen = {t.architecture.fingerprint: t for t in log.trials if t.state in ("evaluated", "failed")}
    while len(seen) < config.trials:
        if should_stop():
            raise Interrupted(f"stopped after {len(seen)} of {config.trials} trials; the same command continues")
        proposal = sampler.propose(log.trials, seen)
        if proposal is None:
            return
        started = time.perf_counter()
        evaluation = evaluate(proposal.architecture)
        seconds = time.perf_counter() - started
        number = len(log.trials)
        finished = []
        for skipped in proposal.skipped:
            excess = budget.excess(skipped.architecture)
            known = seen.get(skipped.architecture.fingerprint)
            finished.append(
                Trial(
                    number + len(finished),
                    skipped.state,
                    skipped.architecture,
                    dict(budget.pricer.expected(skipped.architecture)),
                    known.excess if known else excess,
                    loss=known.loss if known else None,
                    values=known.values if known else (),
                    engine=skipped.engine,
                )
            )
        trial = _judge(
            config, budget, proposal.architecture, evaluation, number + len(finished), seconds, proposal.engine
        )
        finished.append(trial)
        log.append(finished)
        seen[trial.architecture.fingerprint] = trial
        sampler.observe(finished)
        on_trial(finished)


def _judge(
    config: SearchConfig,
    budget: Budget,
    architecture: Architecture,
    evaluation: Evaluation,
    number: int,
    seconds: float,
    engine: dict,
) -> Trial:
    """A trial from an evaluation: measured costs, objectives, and the budget under the load that was measured."""
    measured = budget.pricer.measured(architecture, evaluation.loads)
    excess = budget.excess(architecture) | budget.measured_excess(measured)
    failed = not math.isfinite(evaluation.loss)
    values = (
        () if failed else tuple(evaluation.loss if name == "loss" else measured[name] for name in config.objectives)
    )
    return Trial(
        number,
        "failed" if failed else "evaluated",
        architecture,
        dict(measured),
        excess,
        loss=None if failed else evaluation.loss,
        standard_error=evaluation.standard_error if math.isfinite(evaluation.standard_error) else None,
        loads=evaluation.loads,
        values=values,
        seconds=round(seconds, 4),
        engine=engine,
    )


def result_of(trials: list[Trial]) -> SearchResult | None:
    """The front of a log's feasible trials, or None when there is none."""
    feasible = [trial for trial in trials if trial.feasible]
    if not feasible:
        return None
    points = np.array([trial.values for trial in feasible])
    front = [trial for trial, keep in zip(feasible, non_dominated(points), strict=True) if keep]
    unique = {trial.values: trial for trial in reversed(front)}
    return SearchResult(tuple(sorted(unique.values(), key=lambda t: (t.loss or 0.0, t.number))))


def hypervolume_history(trials: list[Trial]) -> list[tuple[int, float]]:
    """(evaluations so far, hypervolume of the feasible ones) after every evaluation.

    The reference point is the worst value of each objective among all feasible trials, a tenth of their range
    further out, so that histories of one log are comparable with each other and with nothing else.
    """
    feasible = np.array([trial.values for trial in trials if trial.feasible])
    if not len(feasible):
        return []
    worst, best = feasible.max(0), feasible.min(0)
    span = np.where(worst > best, worst - best, 1.0)
    reference = worst + 0.1 * span
    history: list[tuple[int, float]] = []
    points: list[np.ndarray] = []
    evaluations = 0
    for trial in trials:
        if trial.state not in ("evaluated", "failed"):
            continue
        evaluations += 1
        if trial.feasible:
            points.append(np.array(trial.values))
            kept = np.array(points)
            points = list(kept[non_dominated(kept)])
        history.append((evaluations, hypervolume(np.array(points), reference) if points else 0.0))
    return history
