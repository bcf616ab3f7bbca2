"""The search loop: propose, evaluate, log; and the result."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
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
"""With this many failures in a row, the architectures are not the cause."""


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
        self.own = {key: trial.engine for key, trial in self.seen.items() if trial.budget == name}
        self.sampler = make_sampler(self.trials)

    def take(self, trials: list[Trial]) -> None:
        """Trials that just ended."""
        for trial in trials_for_budget(self.name, self.budget, trials):
            self.trials.append(trial)
            if trial.ended:
                self.seen[trial.architecture.fingerprint] = trial
                if trial.budget == self.name:
                    self.own[trial.architecture.fingerprint] = trial.engine

    def evaluated(self) -> int:
        """Number of architectures that were proposed for this budget and evaluated."""
        return len(self.own)

    def state(self, running: Mapping[str, tuple[BudgetSearch, Proposal]]) -> SearchState:
        """What the sampler may know while these proposals are ``running``, by fingerprint."""
        mine = self.own | {key: proposal.engine for key, (search, proposal) in running.items() if search is self}
        architectures = tuple(proposal.architecture for _, proposal in running.values())
        return SearchState(self.trials, self.seen, architectures, tuple(mine.values()))


class Search:
    """A search as its executor sees it: it is asked for architectures and told their outcomes.

    A proposal is made when one is asked for, for the budget with the fewest evaluations so far; there is no waiting for
    a generation. A finished trial is logged before anything else happens, and every budget learns from it. Transient
    failures of an earlier start are evaluated again first.
    """

    def __init__(
        self,
        config: SearchConfig,
        searches: Sequence[BudgetSearch],
        log: TrialLog,
        seed: int = 0,
        on_trial: Callable[[list[Trial]], None] = lambda trials: None,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.config, self.searches, self.log, self.seed = config, searches, log, seed
        self._on_trial, self._should_stop = on_trial, should_stop
        self._counts = {search.name: search.evaluated() for search in searches}
        by_name = {search.name: search for search in searches}
        self._again = deque(
            (by_name[trial.budget], Proposal(trial.architecture, engine=trial.engine))
            for trial in to_repeat(log.trials)
            if trial.budget in by_name and trial.architecture.fingerprint in by_name[trial.budget].seen
        )
        self._running: dict[str, tuple[BudgetSearch, Proposal]] = {}
        self._failures = 0
        self._exhausted = self._stopped = False

    def ask(self) -> Architecture | None:
        """The next architecture; None after a request to stop, when there are enough trials, and when no sampler finds
        a new one inside its budget, which is tried again after the next outcome."""
        if self._exhausted:
            return None
        self._stopped = self._stopped or self._should_stop()
        if self._stopped:
            return None
        found = self._again.popleft() if self._again else self._propose()
        if found is None:
            self._exhausted = True
            return None
        self._running[found[1].architecture.fingerprint] = found
        return found[1].architecture

    def tell(self, outcome: Outcome) -> None:
        """Log an outcome, and the proposals that were skipped before it.

        Raises
        ------
        StageFailed : ``_HOPELESS`` evaluations in a row have failed.
        """
        search, proposal = self._running.pop(outcome.architecture.fingerprint)
        self._exhausted = False
        number = len(self.log.trials)
        finished = [_skipped(number + i, one, search, self.seed) for i, one in enumerate(proposal.skipped)]
        trial = _judge(self.config, search, outcome, number + len(finished), self.seed, proposal.engine)
        finished.append(trial)
        self.log.append(finished)
        for each in self.searches:
            each.take(finished)
        self._on_trial(finished)
        self._failures = self._failures + 1 if trial.state == "failed" else 0
        if self._failures == _HOPELESS:
            raise StageFailed(
                f"{_HOPELESS} evaluations in a row failed",
                where=str(self.log.path),
                found=trial.reason,
                allowed="once the cause is mended, the same command evaluates them again",
            )

    def end(self, say: Callable[[str], None]) -> None:
        """Tell ``say`` which budgets have no more architectures. Raises Interrupted after a request to stop."""
        wanted = self.config.trials
        left = sum(wanted - count for count in self._counts.values()) + len(self._again)
        if left and self._stopped:
            done = sum(self._counts.values()) - len(self._again)
            raise Interrupted(f"stopped after {done} of {done + left} trials; the same command continues")
        for name, count in self._counts.items():
            if count < wanted:
                of = f" {name}" if name else ""
                say(f"search: ends after {count} of {wanted} trials: no other architecture was found inside budget{of}")

    def _propose(self) -> tuple[BudgetSearch, Proposal] | None:
        """The next proposal: from the search with the fewest evaluations that wants more and still finds one."""
        for search in sorted(self.searches, key=lambda search: self._counts[search.name]):
            if self._counts[search.name] < self.config.trials:
                proposal = search.sampler.propose(search.state(self._running))
                if proposal is not None:
                    self._counts[search.name] += 1
                    return search, proposal
        return None


def to_repeat(trials: Sequence[Trial]) -> list[Trial]:
    """The failed trials of a log that are evaluated again when a search starts: transient failures, and all that failed
    in a row at its end if they are so many that the architectures are not the cause."""
    ended = [trial for trial in trials if trial.ended]
    tail = list(takewhile(lambda trial: trial.state == "failed", reversed(ended)))
    hopeless = {trial.number for trial in tail} if len(tail) >= _HOPELESS else set()
    last = {trial.architecture.fingerprint: trial for trial in ended}
    return [t for t in last.values() if t.state == "failed" and (t.transient or t.number in hopeless)]


def without_repeated(trials: Sequence[Trial]) -> list[Trial]:
    """The trials without failures that were evaluated again later."""
    last = {trial.architecture.fingerprint: trial.number for trial in trials if trial.ended}
    return [t for t in trials if t.state != "failed" or last[t.architecture.fingerprint] == t.number]


def run_search(
    config: SearchConfig,
    searches: Sequence[BudgetSearch],
    executor: Executor,
    log: TrialLog,
    seed: int = 0,
    on_trial: Callable[[list[Trial]], None] = lambda trials: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Evaluate until ``log`` holds ``config.trials`` architectures for each search, or nothing new is found inside its
    budget, which ``say`` is told.

    Raises
    ------
    Interrupted : after ``should_stop``, once running evaluations have ended; everything finished is in the log.
    StageFailed : ``_HOPELESS`` evaluations in a row have failed.
    """
    search = Search(config, searches, log, seed, on_trial, should_stop)
    executor.run(search)
    search.end(say)


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
        "transient": outcome.transient,
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
