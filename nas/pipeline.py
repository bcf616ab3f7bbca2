"""Runs all stages in order, or one of them."""

from __future__ import annotations

from rich.console import Console

from moesaic.nas.costs.latency.predictor import LatencyPredictor
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import Occupancy, even
from moesaic.nas.exports.figures import BEST
from moesaic.nas.report.terminal_summary import print_summary
from moesaic.nas.search.budget import find_feasible, resolve_budget
from moesaic.nas.stages.calibrate_latency import calibrated, forget
from moesaic.nas.stages.directory import RunDirectory, stopwatch
from moesaic.nas.stages.engine import do, remedied
from moesaic.nas.stages.provenance import SUMMARY, check_places
from moesaic.nas.stages.run import BudgetRun, Run
from moesaic.nas.stages.run_search import check_executor, check_mirror
from moesaic.nas.stages.stage import BY_NAME, STAGES, Stage
from moesaic.nas.stages.train_supernet import routers
from moesaic.nas.stages.write_report import build_summary, load_summary, write_summary
from moesaic.nas.terminal.progress import Stages
from moesaic.search_spaces import Interrupted


def check_budget(run: Run) -> None:
    """Raises MoesaicError when no architecture can meet a budget, before hours are spent on training.

    Threshold routers are priced as if each token needed one expert: their load after training is not known yet, and
    a budget that may be feasible must not be refused.
    """
    one_expert = Occupancy(
        {
            (slot, experts, router): even(experts, 1)
            for slot, experts, router in routers(run.space)
            if router.kind == "threshold"
        }
    )
    predictor = None
    if any("latency" in part.limits for part in run.budgets):
        with stopwatch() as seconds:
            folder = calibrated(run)
        run.spent_ahead["latency"] = seconds[0]
        predictor = LatencyPredictor.load(folder / "predictor.json", run.device)
    pricer = Pricer(run.context, one_expert, predictor)
    for part in run.budgets:
        find_feasible(run.space, resolve_budget(part.limits, run.space, pricer))


def run_stages(run: Run, console: Console, only: str | None = None, fresh: bool = False) -> None:
    """Run stage ``only``, or all stages, and print the results after the last one.

    With several budgets, stages after the search run for each in turn. ``fresh`` measures latency again.
    """
    with RunDirectory(run.path).locked(), remedied(run):
        check_places(run)
        _ = run.questions  # a file that cannot be read is told before anything is trained
        run.latency_asked |= only == "latency"
        if fresh:
            forget(run)
        if only in (None, "supernet", "search") and not run.folder("search").complete:
            check_mirror(run)
            check_executor(run)
            check_budget(run)
        chosen = [BY_NAME[only]] if only else STAGES
        shared = [(stage, stage.passes(run)) for stage in chosen if stage.shared]
        owned = [(stage, stage.passes(part)) for part in run.budgets for stage in chosen if not stage.shared]
        run.reporter.stages = Stages([(stage.name, passes) for stage, passes in shared + owned])
        for stage in chosen:
            if stage.shared:
                _do(stage, run, run)
        for part in run.budgets:
            own = [stage for stage in chosen if not stage.shared]
            if part.name and own:
                run.reporter.say(f"budget {part.name}: in {part.path}")
            for stage in own:
                _do(stage, part, run)
            if only in (None, "report"):
                if not (part.path / SUMMARY).exists():
                    write_summary(part, build_summary(part))
                files = {
                    "report": part.path / "report" / "index.html",
                    "chosen model": part.folder("export").path / BEST,
                    "figures": part.path / SUMMARY,
                }
                print_summary(console, load_summary(part), files)


def _do(stage: Stage, run: Run | BudgetRun, whole: Run) -> None:
    if whole.should_stop():
        raise Interrupted(f"stopped before stage {stage.name}; the same command continues there")
    stages = whole.reporter.stages
    stages.enter()
    do(stage, run)
    stages.leave(run.folder(stage.name).artifact().seconds)
