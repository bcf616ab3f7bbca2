"""Stage search: evaluate architectures inside the budget with inherited weights; keep log, front and rivals."""

from __future__ import annotations

import csv
import math
import secrets
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random

from moesaic.nas.executors import Executor, LocalExecutor
from moesaic.nas.executors.inherited import InheritedLoss
from moesaic.nas.search.budget import a_member_inside
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.loop import Goal, SearchResult, hypervolume_history, result_of, run_search, trials_under
from moesaic.nas.search.mirror import Mirror, database, journal
from moesaic.nas.search.rivals import judge_rivals
from moesaic.nas.search.samplers import make_sampler
from moesaic.nas.search.samplers.genome import Genome
from moesaic.nas.search.samplers.puzzle import additivity
from moesaic.nas.search.trials import Trial, TrialLog, read_trials
from moesaic.nas.stages.directory import fingerprint
from moesaic.nas.stages.run import Run
from moesaic.search_spaces import MoesaicError, StageFailed
from moesaic.search_spaces.files import read_json, write_atomically, write_json, write_text

_ACCEPTANCE_DRAWS = 2000


def run_search_stage(run: Run) -> None:
    """Leaves ``trials.jsonl``, ``journal.log``, and of each budget ``pareto.csv``, ``rivals.json``, ``search.json``."""
    with run.work("search", extendable=("search.trials", "budgets")) as stage:
        if stage is None:
            return
        config, seed = run.config.search, run.config.seed
        with closing(TrialLog(stage.path / "trials.jsonl")) as log:
            parts = run.parts()
            acceptances = [_acceptance(part) for part in parts]
            goals = [_goal(part, log.trials) for part in parts]
            with _mirror(run, stage.path, log.trials) as mirror, closing(open_executor(run)) as executor:
                with run.task("search") as task:
                    tally = _Tally()
                    tally.add(log.trials)

                    def on_trial(finished: list[Trial]) -> None:
                        mirror.append(finished)
                        tally.add(finished)
                        task.update(tally.ended, config.trials * len(goals), str(tally))

                    run_search(config, goals, executor, log, seed, on_trial, run.should_stop)
                with run.task("rivals"):
                    for part, goal, acceptance in zip(parts, goals, acceptances, strict=True):
                        _write_result(part, goal, acceptance, executor)
        write_text(stage.path / "digest", fingerprint({"trials": [t.architecture.fingerprint for t in log.trials]}))


def check_mirror(run: Run) -> None:
    """Raises MoesaicError when no database opens at ``mirror``, before hours of training are spent."""
    if run.config.mirror:
        database(run.config.mirror)


@dataclass
class _Tally:
    """What the line of progress says of the trials so far."""

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
    """The study keeps its name as long as its folder is there: runs of one name may share a database."""
    names = folder / "study.json"
    if not names.exists():
        write_json(names, f"{run.config.name}-{secrets.token_hex(4)}")
    storage = database(run.config.mirror) if run.config.mirror else journal(folder / "journal.log")
    objectives = run.config.search.objectives
    return Mirror(storage, read_json(names), objectives, Genome(run.space), trials, run.reporter.say)


def _acceptance(part: Run) -> float:
    """The share of random architectures inside the budget."""
    rng = Random(f"{part.config.seed}/acceptance")
    acceptance = _feasible(part).acceptance(_ACCEPTANCE_DRAWS, rng)
    named = f"{part.name}: " if part.name else ""
    lines = " and ".join(map(str, part.budget.lines))
    part.reporter.say(f"search: {named}{lines}; {acceptance:.1%} of random architectures fit")
    return acceptance


def _goal(part: Run, log: list[Trial]) -> Goal:
    config, feasible = part.config, _feasible(part)
    return Goal(
        part.name, part.budget, lambda history: make_sampler(config.search, feasible, config.seed, history), log
    )


def _feasible(part: Run) -> FeasibleSampler:
    return FeasibleSampler(part.space, part.budget, a_member_inside(part.space, part.budget))


def _write_result(part: Run, goal: Goal, acceptance: float, executor: Executor) -> None:
    """Front, rivals and figures of one budget."""
    folder, trials = search_folder(part), goal.trials
    result = result_of(trials)
    if result is None:
        raise StageFailed(
            "no evaluated architecture is inside the budget: measured routing costs more than was expected",
            where=str(part.stages["search"].path / "trials.jsonl"),
            found=part.name or None,
            allowed="a larger budget, or more trials",
        )
    rivals = judge_rivals(part.space, goal.budget, executor)
    rows = [
        {"kind": r.kind, "loss": r.loss, "costs": dict(r.costs), "architecture": r.architecture.to_dict()}
        for judged in rivals.values()
        for r in judged
    ]
    folder.mkdir(exist_ok=True)
    write_json(folder / "rivals.json", rows)
    write_front(folder / "pareto.csv", result)
    states = [trial.state for trial in trials]
    write_json(
        folder / "search.json",
        {
            "sampler": part.config.search.sampler,
            "objectives": part.config.search.objectives,
            "acceptance": acceptance,
            "counts": {state: states.count(state) for state in ("evaluated", "refused", "duplicate", "failed")},
            "over_budget_when_measured": sum(t.state == "evaluated" and not t.feasible for t in trials),
            "front": [trial.number for trial in result.front],
            "best": result.best.number,
            "hypervolume": hypervolume_history(trials)[-1][1],
            "additivity": additivity(trials),
        },
    )


def search_folder(run: Run) -> Path:
    """Where what the search found for this run's budget is."""
    return run.stages["search"].path / run.name


def inherited_loss(run: Run) -> InheritedLoss:
    """The judge of the search, on its held-out windows."""
    windows = run.windows("validation", run.config.search.evaluation_windows)
    return InheritedLoss(run.supernet, windows, run.device)


def open_executor(run: Run) -> Executor:
    """The executor that the configuration names."""
    config = run.config.executor
    if config.kind == "local":
        return LocalExecutor(inherited_loss(run))
    try:
        from moesaic.nas.executors.ray_lanes import RayExecutor
    except ImportError:
        raise MoesaicError(
            "Ray is not installed", where="executor.kind", found="ray", nearest="pip install 'moesaic[cluster]'"
        ) from None
    return RayExecutor(config, inherited_loss(run), run.config.device, run.reporter.say)


def load_search(run: Run) -> tuple[list[Trial], SearchResult]:
    """The trials, as this run's budget sees them, and the front of the finished search."""
    run.require("search", for_stage="export")
    trials = trials_under(run.name, run.budget, read_trials(run.stages["search"].path / "trials.jsonl"))
    result = result_of(trials)
    assert result is not None, "a finished search has a front"
    return trials, result


def write_front(path: Path, result: SearchResult) -> None:
    """The front as a table: a row per member, its objectives, costs and fingerprint."""
    costs = list(result.best.costs)

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["trial", "fingerprint", "loss", "standard_error", *costs])
            for trial in result.front:
                writer.writerow(
                    [
                        trial.number,
                        trial.architecture.fingerprint,
                        trial.loss,
                        trial.standard_error,
                        *(trial.costs[cost] for cost in costs),
                    ]
                )

    write_atomically(path, write)
