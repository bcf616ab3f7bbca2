"""Stage search: evaluate architectures inside the budget with inherited weights; keep log, front and rivals."""

from __future__ import annotations

import csv
from contextlib import closing
from pathlib import Path
from random import Random

from nas.executors import Executor, LocalExecutor
from nas.executors.inherited import InheritedLoss
from nas.run_directory import fingerprint
from nas.search.budget import a_member_inside
from nas.search.feasible import FeasibleSampler
from nas.search.genome import Genome
from nas.search.loop import SearchResult, hypervolume_history, result_of, run_search
from nas.search.mirror import JournalMirror
from nas.search.rivals import judge_rivals
from nas.search.samplers import make_sampler
from nas.search.trials import Trial, TrialLog, read_trials
from nas.stages.run import Run
from search_spaces import MoesaicError, StageFailed
from search_spaces.files import write_atomically, write_json, write_text

_ACCEPTANCE_DRAWS = 2000


def run_search_stage(run: Run) -> None:
    """Leaves ``trials.jsonl``, ``journal.log``, ``pareto.csv``, ``rivals.json`` and ``search.json``."""
    with run.work("search", extendable=("search.trials",)) as stage:
        if stage is None:
            return
        config, budget, seed = run.config.search, run.budget, run.config.seed
        feasible = FeasibleSampler(run.space, budget, a_member_inside(run.space, budget))
        acceptance = feasible.acceptance(_ACCEPTANCE_DRAWS, Random(f"{seed}/acceptance"))
        run.reporter.say(
            f"search: {' and '.join(map(str, budget.lines))}; {acceptance:.1%} of random architectures fit"
        )
        log = TrialLog(stage.path / "trials.jsonl")
        sampler = make_sampler(config, feasible, seed, log.trials)
        mirror = JournalMirror(
            stage.path / "journal.log", run.config.name, list(config.objectives), Genome(run.space), log.trials
        )
        with closing(log), closing(open_executor(run)) as executor:
            with run.task("search") as task:

                def on_trial(finished: list[Trial]) -> None:
                    mirror.append(finished)
                    done = sum(trial.state in ("evaluated", "failed") for trial in log.trials)
                    losses = [trial.loss for trial in log.trials if trial.feasible and trial.loss is not None]
                    refused = sum(trial.state == "refused" for trial in log.trials)
                    best = f"best loss {min(losses):.4f}" if losses else "none inside the budget yet"
                    task.update(done, config.trials, f"{best}  refused {refused}")

                run_search(config, budget, sampler, executor, log, seed, on_trial, run.should_stop)
            result = result_of(log.trials)
            if result is None:
                raise StageFailed(
                    "no evaluated architecture is inside the budget: measured routing costs more than was expected",
                    where=str(log.path),
                    allowed="a larger budget, or more trials",
                )
            with run.task("rivals"):
                rivals = judge_rivals(run.space, budget, executor)
        rows = [
            {"kind": r.kind, "loss": r.loss, "costs": dict(r.costs), "architecture": r.architecture.to_dict()}
            for judged in rivals.values()
            for r in judged
        ]
        write_json(stage.path / "rivals.json", rows)
        write_front(stage.path / "pareto.csv", result)
        states = [trial.state for trial in log.trials]
        write_json(
            stage.path / "search.json",
            {
                "sampler": config.sampler,
                "objectives": config.objectives,
                "acceptance": acceptance,
                "counts": {state: states.count(state) for state in ("evaluated", "refused", "duplicate", "failed")},
                "over_budget_when_measured": sum(t.state == "evaluated" and not t.feasible for t in log.trials),
                "front": [trial.number for trial in result.front],
                "best": result.best.number,
                "hypervolume": hypervolume_history(log.trials)[-1][1],
            },
        )
        write_text(stage.path / "digest", fingerprint({"trials": [t.architecture.fingerprint for t in log.trials]}))


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
        from nas.executors.ray_lanes import RayExecutor
    except ImportError:
        raise MoesaicError(
            "Ray is not installed", where="executor.kind", found="ray", nearest="pip install 'moesaic[cluster]'"
        ) from None
    return RayExecutor(config, inherited_loss(run), run.config.device, run.reporter.say)


def load_search(run: Run) -> tuple[list[Trial], SearchResult]:
    """The trials and the front of the finished search."""
    run.require("search", for_stage="export")
    trials = read_trials(run.stages["search"].path / "trials.jsonl")
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
