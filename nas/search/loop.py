"""The search loop: propose, evaluate, log; and the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from moesaic.nas.config import SearchConfig
from moesaic.nas.executors import Executor, Outcome
from moesaic.nas.search.budget import Budget
from moesaic.nas.search.pareto import hypervolumes, non_dominated
from moesaic.nas.search.proposal import Proposal, Sampler, SearchState, Skipped
from moesaic.nas.search.trials import Trial, TrialLog
from moesaic.search_spaces import Architecture, Interrupted, StageFailed

_HOPELESS = 20
"""With this many failures and no single loss, the architectures are not the cause."""


@dataclass(frozen=True)
class SearchResult:
    """``front``: non-dominated feasible trials, by rising loss. ``best``: the one with the lowest loss."""

    front: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        return self.front[0]


@dataclass(frozen=True)
class SearchFigures:
    """``search.json`` of one budget. ``acceptance``: the share of random architectures inside it; ``counts``: trials by
    outcome; ``front`` and ``best``: numbers of trials."""

    sampler: str
    objectives: tuple[str, ...]
    acceptance: float
    counts: dict[str, int]
    over_budget_when_measured: int
    front: tuple[int, ...]
    best: int
    hypervolume: float
    additivity: dict[str, float | None] | None


def trials_for_budget(name: str, budget: Budget, trials: Sequence[Trial]) -> list[Trial]:
    """The named budget's view of the trials, with their excess over it: everything evaluated for any budget, and its
    own refusals and duplicates."""
    seen = []
    for trial in trials:
        if trial.budget == name:
            seen.append(trial)
        elif trial.ended:
            excess = budget.excess(trial.architecture)
            if trial.state == "evaluated":
                excess |= budget.measured_excess(trial.costs)
            seen.append(replace(trial, excess=excess))
    return seen


class BudgetSearch:
    """One budget, its sampler, and its view of the trials so far.

    ``make_sampler`` gets the trials of ``log``. A single budget has an empty name.
    """

    def __init__(
        self, name: str, budget: Budget, make_sampler: Callable[[list[Trial]], Sampler], log: Sequence[Trial] = ()
    ):
        self.name, self.budget = name, budget
        self.trials = trials_for_budget(name, budget, log)
        self.seen = {t.architecture.fingerprint: t for t in self.trials if t.ended}
        self.sampler = make_sampler(self.trials)

    def take(self, trials: list[Trial]) -> None:
        """Trials that just ended."""
        for trial in trials_for_budget(self.name, self.budget, trials):
            self.trials.append(trial)
            if trial.ended:
                self.seen[trial.architecture.fingerprint] = trial

    def evaluated(self) -> int:
        """Evaluations that were proposed for this budget."""
        return sum(trial.ended and trial.budget == self.name for trial in self.trials)


def run_search(
    config: SearchConfig,
    searches: Sequence[BudgetSearch],
    executor: Executor,
    log: TrialLog,
    seed: int = 0,
    on_trial: Callable[[list[Trial]], None] = lambda trials: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Evaluate until ``log`` holds ``config.trials`` evaluations for each search, or nothing new is found inside its
    budget.

    A free lane gets a proposal at once, for the search with the fewest so far; there is no waiting for a generation. A
    finished trial is logged before anything else happens, and every search learns from it.

    Raises
    ------
    Interrupted : after ``should_stop``, once running evaluations have ended; everything finished is in the log.
    StageFailed : no evaluation of the first ``_HOPELESS`` gave a loss.
    """
    counts = {search.name: search.evaluated() for search in searches}
    running: dict[str, tuple[BudgetSearch, Proposal]] = {}
    while True:
        while executor.free and not should_stop():
            proposed = tuple(proposal.architecture for _, proposal in running.values())
            found = _next_proposal(searches, counts, config.trials, proposed)
            if found is None:
                break
            search, proposal = found
            counts[search.name] += 1
            running[proposal.architecture.fingerprint] = found
            executor.submit(proposal.architecture)
        if not running:
            break
        outcome = executor.next()
        search, proposal = running.pop(outcome.architecture.fingerprint)
        number = len(log.trials)
        finished = [_skipped(number + i, one, search, seed) for i, one in enumerate(proposal.skipped)]
        trial = _judge(config, search, outcome, number + len(finished), seed, proposal.engine)
        finished.append(trial)
        log.append(finished)
        for each in searches:
            each.take(finished)
        on_trial(finished)
        if len(search.seen) == _HOPELESS and all(one.state == "failed" for one in search.seen.values()):
            problem = f"none of the first {_HOPELESS} architectures could be evaluated"
            raise StageFailed(problem, where=str(log.path), found=trial.reason)
    left = sum(config.trials - count for count in counts.values())
    if left and should_stop():
        done = sum(counts.values())
        raise Interrupted(f"stopped after {done} of {done + left} trials; the same command continues")


def _next_proposal(
    searches: Sequence[BudgetSearch], counts: dict[str, int], trials: int, running: tuple[Architecture, ...]
) -> tuple[BudgetSearch, Proposal] | None:
    """The next proposal: from the search with the fewest evaluations that wants more and still finds one."""
    for search in sorted(searches, key=lambda search: counts[search.name]):
        if counts[search.name] < trials:
            proposal = search.sampler.propose(SearchState(search.trials, search.seen, running))
            if proposal is not None:
                return search, proposal
    return None


def _skipped(number: int, skipped: Skipped, search: BudgetSearch, seed: int) -> Trial:
    """The trial of a proposal that was not evaluated; a duplicate gets the values of the earlier trial."""
    architecture, budget = skipped.architecture, search.budget
    known = search.seen.get(architecture.fingerprint)
    return Trial(
        number,
        skipped.state,
        architecture,
        dict(budget.pricer.expected(architecture)),
        known.excess if known else budget.excess(architecture),
        loss=known.loss if known else None,
        values=known.values if known else (),
        seed=seed,
        budget=search.name,
        engine=skipped.engine,
    )


def _judge(config: SearchConfig, search: BudgetSearch, outcome: Outcome, number: int, seed: int, engine: dict) -> Trial:
    """A trial from an evaluation: measured costs, objectives, and the excess over the budget under the measured load;
    or the reason why there are none."""
    architecture, evaluation, budget = outcome.architecture, outcome.evaluation, search.budget
    ran: dict[str, Any] = {
        "seconds": round(outcome.seconds, 4),
        "seed": seed,
        "budget": search.name,
        "lane": outcome.lane,
        "attempts": outcome.attempts,
        "engine": engine,
    }
    excess = budget.excess(architecture)
    if evaluation is None:
        costs = dict(budget.pricer.expected(architecture))
        return Trial(number, "failed", architecture, costs, excess, reason=outcome.reason, **ran)
    measured = dict(budget.pricer.measured(architecture, evaluation.loads))
    excess |= budget.measured_excess(measured)
    if not math.isfinite(evaluation.loss):
        reason = f"its loss is {evaluation.loss}"
        return Trial(number, "failed", architecture, measured, excess, loads=evaluation.loads, reason=reason, **ran)
    return Trial(
        number,
        "evaluated",
        architecture,
        measured,
        excess,
        loss=evaluation.loss,
        standard_error=evaluation.standard_error if math.isfinite(evaluation.standard_error) else None,
        loads=evaluation.loads,
        values=tuple(evaluation.loss if name == "loss" else measured[name] for name in config.objectives),
        **ran,
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

    The reference point is the worst value of each objective among all feasible trials, plus a tenth of their range. So
    only histories from the same log can be compared.
    """
    ended = [trial for trial in trials if trial.ended]
    points = np.array([trial.values for trial in ended if trial.feasible])
    if not len(points):
        return []
    worst, best = points.max(0), points.min(0)
    reference = worst + 0.1 * np.where(worst > best, worst - best, 1.0)
    volumes = [0.0, *hypervolumes(points, reference).tolist()]
    feasible = accumulate(int(trial.feasible) for trial in ended)
    return [(number, volumes[count]) for number, count in enumerate(feasible, start=1)]
