"""Stage search: evaluate architectures inside the budget with inherited weights; write the log, front and rivals."""

from __future__ import annotations

import math
import secrets
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from moesaic.nas.executors import Executor, LocalExecutor
from moesaic.nas.search.budget import find_feasible
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.loop import (
    BudgetSearch,
    SearchFigures,
    SearchResult,
    hypervolume_history,
    result_of,
    run_search,
    trials_for_budget,
)
from moesaic.nas.search.mirror import Mirror, database, journal
from moesaic.nas.search.rivals import Rival, judge_rivals
from moesaic.nas.search.samplers import make_sampler
from moesaic.nas.search.samplers.genome import Genome
from moesaic.nas.search.samplers.scores import additivity
from moesaic.nas.search.trials import Trial, TrialLog, read_trials
from moesaic.nas.stages.directory import StageDirectory, fingerprint
from moesaic.nas.stages.run import BudgetRun, Run
from moesaic.nas.terminal.tables import write_csv
from moesaic.search_spaces import MoesaicError, StageFailed
from moesaic.search_spaces.files import read_json, write_json, write_value

_ACCEPTANCE_DRAWS = 2000


def inputs(run: Run) -> dict[str, Any]:
    return run.config.model_dump(mode="json", include={"seed", "budget", "budgets", "search"})


def work(run: Run, directory: StageDirectory) -> str:
    """Writes ``trials.jsonl``; ``journal.log`` (without a ``mirror``); and for each budget ``pareto.csv``,
    ``rivals.json``, ``search.json``."""
    config, seed = run.config.search, run.config.seed
    with closing(TrialLog(directory.path / "trials.jsonl")) as log:
        acceptances = [_acceptance(part) for part in run.budgets]
        searches = [_budget_search(part, log.trials) for part in run.budgets]
        with _mirror(run, directory.path, log.trials) as mirror, closing(open_executor(run)) as executor:
            with run.reporter.progress("search") as bar:
                tally = _Tally()
                tally.add(log.trials)

                def on_trial(finished: list[Trial]) -> None:
                    mirror.append(finished)
                    tally.add(finished)
                    bar.update(tally.ended, config.trials * len(searches), str(tally))

                run_search(config, searches, executor, log, seed, on_trial, run.should_stop)
            with run.reporter.progress("rivals"):
                for part, search, acceptance in zip(run.budgets, searches, acceptances, strict=True):
                    _write_result(part, search, acceptance, executor)
    return fingerprint({"trials": [trial.architecture.fingerprint for trial in log.trials]})


def check_mirror(run: Run) -> None:
    """Raises MoesaicError when the database at ``mirror`` cannot be opened, before hours are spent on training."""
    if run.config.mirror:
        database(run.config.mirror)


@dataclass
class _Tally:
    """Figures of the trials so far for the progress line."""

    ended: int = 0
    refused: int = 0
    best: float = math.inf

    def add(self, trials: list[Trial]) -> None:
        for trial in trials:
            self.ended += trial.ended
            self.refused += trial.state == "refused"
            if trial.feasible and trial.loss is not None:
                self.best = min(self.best, trial.loss)

    def __str__(self) -> str:
        best = f"best loss {self.best:.4f}" if math.isfinite(self.best) else "none inside the budget yet"
        return f"{best}  refused {self.refused}"


def _mirror(run: Run, folder: Path, trials: list[Trial]) -> Mirror:
    """The study's name, kept as long as its folder exists: runs with the same name may share a database."""
    names = folder / "study.json"
    if not names.exists():
        write_json(names, f"{run.config.name}-{secrets.token_hex(4)}")
    storage = database(run.config.mirror) if run.config.mirror else journal(folder / "journal.log")
    objectives = run.config.search.objectives
    return Mirror(storage, read_json(names), objectives, Genome(run.space), trials, run.reporter.say)


def _acceptance(part: BudgetRun) -> float:
    """The share of random architectures inside the budget."""
    rng = Random(f"{part.run.config.seed}/acceptance")
    acceptance = _feasible(part).acceptance(_ACCEPTANCE_DRAWS, rng)
    named = f"{part.name}: " if part.name else ""
    lines = " and ".join(map(str, part.budget.lines))
    part.reporter.say(f"search: {named}{lines}; {acceptance:.1%} of random architectures fit")
    return acceptance


def _budget_search(part: BudgetRun, log: list[Trial]) -> BudgetSearch:
    config, feasible = part.run.config, _feasible(part)
    return BudgetSearch(
        part.name, part.budget, lambda history: make_sampler(config.search, feasible, config.seed, history), log
    )


def _feasible(part: BudgetRun) -> FeasibleSampler:
    space = part.run.space
    return FeasibleSampler(space, part.budget, find_feasible(space, part.budget))


def _write_result(part: BudgetRun, search: BudgetSearch, acceptance: float, executor: Executor) -> None:
    """Front, rivals and figures of one budget."""
    folder, trials, config = search_folder(part), search.trials, part.run.config.search
    result = result_of(trials)
    if result is None:
        raise StageFailed(
            "no evaluated architecture is inside the budget: measured routing costs more than was expected",
            where=str(part.folder("search").path / "trials.jsonl"),
            found=part.name or None,
            allowed="a larger budget, or more trials",
        )
    rivals = judge_rivals(part.run.space, search.budget, executor)
    folder.mkdir(exist_ok=True)
    write_value(folder / "rivals.json", [rival for kind in rivals.values() for rival in kind], list[Rival])
    write_front(folder / "pareto.csv", result)
    states = [trial.state for trial in trials]
    figures = SearchFigures(
        sampler=config.sampler,
        objectives=tuple(config.objectives),
        acceptance=acceptance,
        counts={state: states.count(state) for state in ("evaluated", "refused", "duplicate", "failed")},
        over_budget_when_measured=sum(t.state == "evaluated" and not t.feasible for t in trials),
        front=tuple(trial.number for trial in result.front),
        best=result.best.number,
        hypervolume=hypervolume_history(trials)[-1][1],
        additivity=additivity(trials),
    )
    write_value(folder / "search.json", figures)


def search_folder(part: BudgetRun) -> Path:
    """The folder of the search results for one budget."""
    return part.folder("search").path / part.name


def open_executor(run: Run) -> Executor:
    """The configured executor, with the search's evaluator."""
    config, judge = run.config.executor, run.judge("validation", run.config.search.evaluation_windows)
    if config.kind == "local":
        return LocalExecutor(judge)
    try:
        from moesaic.nas.executors.ray_lanes import RayExecutor
    except ImportError:
        raise MoesaicError(
            "Ray is not installed", where="executor.kind", found="ray", nearest="pip install 'moesaic[cluster]'"
        ) from None
    return RayExecutor(config, judge, run.config.device, run.reporter.say)


def load_search(part: BudgetRun) -> tuple[list[Trial], SearchResult]:
    """This budget's view of the trials, and the front of the finished search."""
    log = read_trials(part.folder("search").path / "trials.jsonl")
    trials = trials_for_budget(part.name, part.budget, log)
    result = result_of(trials)
    assert result is not None, "a finished search has a front"
    return trials, result


def write_front(path: Path, result: SearchResult) -> None:
    """The front as a table: a row per member, its loss, costs and fingerprint."""
    rows = [
        {
            "trial": trial.number,
            "fingerprint": trial.architecture.fingerprint,
            "loss": trial.loss,
            "standard_error": trial.standard_error,
            **{cost: trial.costs[cost] for cost in result.best.costs},
        }
        for trial in result.front
    ]
    write_csv(path, rows)
