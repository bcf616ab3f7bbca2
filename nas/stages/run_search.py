"""Stage search: evaluate architectures inside the budget with inherited weights; write the log, front and rivals."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
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
    without_repeated,
)
from moesaic.nas.search.rivals import JUDGED, Rival, judge_rivals
from moesaic.nas.search.samplers import make_sampler
from moesaic.nas.search.samplers.scores import additivity
from moesaic.nas.search.trials import Trial, TrialLog, first_trials, read_trials
from moesaic.nas.stages.directory import StageDirectory, fingerprint
from moesaic.nas.stages.run import BudgetRun, Run
from moesaic.nas.stages.split_model import load_scores
from moesaic.nas.terminal.tables import write_csv
from moesaic.search_spaces import MoesaicError, StageFailed
from moesaic.search_spaces.files import read_json, write_json, write_value

_ACCEPTANCE_DRAWS = 2000


def inputs(run: Run) -> dict[str, Any]:
    """The executor is not among them: it decides where, and so in which order, architectures are evaluated."""
    config = run.config.model_dump(mode="json", include={"seed", "budget", "search", "mirror"})
    budgets = {name: [f"{cost} {line}" for cost, line in lines.items()] for name, lines in run.config.budgets.items()}
    return config | {"budgets": budgets, "context": asdict(run.context)}


def passes(run: Run) -> float:
    config = run.config
    evaluations = config.search.trials + (2 * JUDGED if config.retrain.rivals else 0)
    return float(evaluations * len(config.budgets_by_name) * config.search.evaluation_windows)


def work(run: Run, directory: StageDirectory) -> str:
    """Writes ``trials.jsonl``; ``journal.log`` (without a ``mirror``); and for each budget ``pareto.csv``,
    ``rivals.json``, ``search.json``."""
    config, seed = run.config.search, run.config.seed
    with closing(TrialLog(directory.path / "trials.jsonl")) as log:
        acceptances = [_acceptance(part) for part in run.budgets]
        known = first_trials(log.trials, config.trials)  # a log may have more than are asked for now
        searches = [_budget_search(part, known) for part in run.budgets]
        with _mirror(run, directory.path, log.trials) as mirror, closing(open_executor(run)) as executor:
            with run.reporter.progress("search") as bar:
                tally = _Tally()
                tally.add(known)

                def on_trial(finished: list[Trial]) -> None:
                    mirror(finished)
                    tally.add(finished)
                    bar.update(tally.ended, config.trials * len(searches), str(tally))

                run_search(config, searches, executor, log, seed, on_trial, run.should_stop, run.reporter.say)
            for part, search, acceptance in zip(run.budgets, searches, acceptances, strict=True):
                _write_result(part, search, acceptance, executor)
        trials = first_trials(log.trials, config.trials)
    return fingerprint({"trials": [trial.architecture.fingerprint for trial in trials]})


def check_mirror(run: Run) -> None:
    """Raises as ``check_database`` when there is a ``mirror``, before hours are spent on training."""
    if run.config.mirror:
        from moesaic.nas.search.mirror import check_database

        check_database(run.config.mirror, run.should_stop)


def check_executor(run: Run) -> None:
    """Raises MoesaicError when the packages of ``executor.kind`` are not installed, or ``executor.storage`` cannot be
    made, before hours are spent on training."""
    if run.config.executor.kind == "ray":
        _ray_executor()
    elif run.config.executor.kind == "tune":
        _tune_executor().storage_of(run.config.executor)


@dataclass
class _Tally:
    """Figures of the trials so far for the progress line."""

    seen: set[tuple[str, str]] = field(default_factory=set)
    refused: int = 0
    best: float = math.inf

    @property
    def ended(self) -> int:
        """Architectures evaluated; one that failed may have been evaluated again."""
        return len(self.seen)

    def add(self, trials: list[Trial]) -> None:
        for trial in trials:
            if trial.ended:
                self.seen.add((trial.budget, trial.architecture.fingerprint))
            self.refused += trial.state == "refused"
            if trial.feasible and trial.loss is not None:
                self.best = min(self.best, trial.loss)

    def __str__(self) -> str:
        best = f"best loss {self.best:.4f}" if math.isfinite(self.best) else "none inside the budget yet"
        return f"{best}  refused {self.refused}"


@contextmanager
def _mirror(run: Run, folder: Path, trials: list[Trial]) -> Iterator[Callable[[list[Trial]], None]]:
    """Copies trials into a study while the search runs; machines without Optuna search without a study.

    The study's name is kept as long as its folder exists: runs with the same name may share a database.
    """
    try:
        from moesaic.nas.search.mirror import Mirror, database, journal
        from moesaic.nas.search.samplers.genome import Genome
    except ModuleNotFoundError as error:
        run.reporter.say(f"search: {error.name} is not installed, so there is no study; trials.jsonl has every trial")
        yield lambda finished: None
        return
    names = folder / "study.json"
    if not names.exists():
        write_json(names, f"{run.config.name}-{secrets.token_hex(4)}")
    url, file = run.config.mirror, folder / "journal.log"
    if url:
        file.unlink(missing_ok=True)  # of a search without a database, which would end here
    objectives, genome = run.config.search.objectives, Genome(run.space)
    opened = partial(database, url) if url else partial(journal, file)
    name = read_json(names)
    with Mirror(opened, name, objectives, genome, trials, run.reporter.say, run.should_stop) as mirror:
        yield mirror.append


def _acceptance(part: BudgetRun) -> float:
    """The share of random architectures inside the budget."""
    rng = Random(f"{part.run.config.seed}/acceptance")
    acceptance = _feasible(part).acceptance(_ACCEPTANCE_DRAWS, rng)
    named = f"{part.name}: " if part.name else ""
    lines = " and ".join(map(str, part.budget.lines))
    part.reporter.say(f"search: {named}{lines}; {acceptance:.1%} of random architectures fit")
    return acceptance


def _budget_search(part: BudgetRun, log: list[Trial]) -> BudgetSearch:
    config, feasible, scores = part.run.config, _feasible(part), load_scores(part.run)
    return BudgetSearch(
        part.name, part.budget, lambda history: make_sampler(config.search, feasible, config.seed, history, scores), log
    )


def _feasible(part: BudgetRun) -> FeasibleSampler:
    space = part.run.space
    return FeasibleSampler(space, part.budget, find_feasible(space, part.budget))


def _write_result(part: BudgetRun, search: BudgetSearch, acceptance: float, executor: Executor) -> None:
    """Front, rivals and figures of one budget."""
    folder, trials, config = search_folder(part), without_repeated(search.trials), part.run.config.search
    result = result_of(trials)
    if result is None:
        raise StageFailed(
            "no evaluated architecture is inside the budget: measured routing costs more than was expected",
            where=str(part.folder("search").path / "trials.jsonl"),
            found=part.name or None,
            allowed="a larger budget, or more trials",
        )
    with part.reporter.progress("rivals") as bar:

        def on_judged(done: int, total: int) -> None:
            bar.update(done, total)
            part.run.check_stop("rivals")

        rivals = judge_rivals(part.run.space, search.budget, executor, on_judged)
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
    if config.kind == "ray":
        return _ray_executor().RayExecutor(config, judge, run.config.device, run.reporter.say)
    return _tune_executor().TuneExecutor(config, judge, run.config.device, run.reporter.say, run.tune_callbacks)


def _ray_executor() -> Any:
    try:
        from moesaic.nas.executors import ray_lanes
    except ImportError as error:
        raise _missing("Ray", "ray", "cluster", error) from None
    return ray_lanes


def _tune_executor() -> Any:
    try:
        from moesaic.nas.executors import tune_trials
    except ImportError as error:
        raise _missing("Ray Tune", "tune", "tune", error) from None
    return tune_trials


def _missing(what: str, kind: str, extra: str, error: ImportError) -> MoesaicError:
    return MoesaicError(
        f"{what} is not installed",
        where="executor.kind",
        found=f"{kind} ({str(error).partition('.')[0]})",
        nearest=f"pip install 'moesaic[{extra}]'",
    )


def load_search(part: BudgetRun) -> tuple[list[Trial], SearchResult]:
    """This budget's view of the trials, and the front of the finished search."""
    log = read_trials(part.folder("search").path / "trials.jsonl")
    log = first_trials(log, part.run.config.search.trials)
    trials = without_repeated(trials_for_budget(part.name, part.budget, log))
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
