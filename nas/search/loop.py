"""The search itself: propose, evaluate, log; and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.config import SearchConfig
from nas.executors import Executor, Outcome
from nas.search.budget import Budget
from nas.search.pareto import hypervolume, non_dominated
from nas.search.proposal import Progress, Proposal, Sampler, Skipped
from nas.search.trials import Trial, TrialLog
from search_spaces import Interrupted, StageFailed

_HOPELESS = 20
"""So many failures without a single loss are the fault of no architecture."""


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
    executor: Executor,
    log: TrialLog,
    seed: int = 0,
    on_trial: Callable[[list[Trial]], None] = lambda trials: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Evaluate until ``log`` holds ``config.trials`` evaluations, or no new architecture is found inside the budget.

    A lane that is free gets the next proposal at once; no generation is waited for. What ends is in the log before
    anything else is done.

    Raises
    ------
    Interrupted : after ``should_stop``, when what was running has ended; everything finished is in the log.
    StageFailed : no evaluation of the first ``_HOPELESS`` gave a loss.
    """
    seen = {t.architecture.fingerprint: t for t in log.trials if t.state in ("evaluated", "failed")}
    running: dict[str, Proposal] = {}
    while True:
        while executor.free and len(seen) + len(running) < config.trials and not should_stop():
            proposal = sampler.propose(Progress(log.trials, seen, frozenset(running)))
            if proposal is None:
                break
            running[proposal.architecture.fingerprint] = proposal
            executor.submit(proposal.architecture)
        if not running:
            break
        outcome = executor.next()
        proposal = running.pop(outcome.architecture.fingerprint)
        number = len(log.trials)
        finished = [_skipped(number + i, one, seen, budget, seed) for i, one in enumerate(proposal.skipped)]
        trial = _judge(config, budget, outcome, number + len(finished), seed, proposal.engine)
        finished.append(trial)
        log.append(finished)
        seen[trial.architecture.fingerprint] = trial
        sampler.observe(trial)
        on_trial(finished)
        if len(seen) == _HOPELESS and all(one.state == "failed" for one in seen.values()):
            problem = f"none of the first {_HOPELESS} architectures could be evaluated"
            raise StageFailed(problem, where=str(log.path), found=trial.reason)
    if len(seen) < config.trials and should_stop():
        raise Interrupted(f"stopped after {len(seen)} of {config.trials} trials; the same command continues")


def _skipped(number: int, skipped: Skipped, seen: dict[str, Trial], budget: Budget, seed: int) -> Trial:
    """The trial of a proposal that was not evaluated; one known before has that one's values."""
    architecture = skipped.architecture
    known = seen.get(architecture.fingerprint)
    return Trial(
        number,
        skipped.state,
        architecture,
        dict(budget.pricer.expected(architecture)),
        known.excess if known else budget.excess(architecture),
        loss=known.loss if known else None,
        values=known.values if known else (),
        seed=seed,
        engine=skipped.engine,
    )


def _judge(config: SearchConfig, budget: Budget, outcome: Outcome, number: int, seed: int, engine: dict) -> Trial:
    """A trial from what an evaluation gave: measured costs, objectives, and the budget under the load that was
    measured; or why there are none."""
    architecture, evaluation = outcome.architecture, outcome.evaluation
    ran: dict[str, Any] = {
        "seconds": round(outcome.seconds, 4),
        "seed": seed,
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
