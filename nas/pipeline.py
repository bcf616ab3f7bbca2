"""All stages in order, or one of them; and the files of a run that belong to no stage."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from moesaic.nas.costs.latency.predictor import LatencyPredictor
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import Occupancy, even
from moesaic.nas.report.summary import build_summary, print_summary, versions
from moesaic.nas.search.budget import a_member_inside, resolve_budget
from moesaic.nas.stages.calibrate_latency import calibrated, run_latency
from moesaic.nas.stages.check_fidelity import run_fidelity
from moesaic.nas.stages.directory import stopwatch
from moesaic.nas.stages.export_models import run_export
from moesaic.nas.stages.retrain_models import run_retrain
from moesaic.nas.stages.run import SHARED_STAGES, STAGES, Run
from moesaic.nas.stages.run_search import check_mirror, run_search_stage
from moesaic.nas.stages.train_supernet import routers, run_supernet
from moesaic.nas.stages.write_report import run_report
from moesaic.search_spaces import Interrupted
from moesaic.search_spaces.files import read_json, write_json, write_text

_FUNCTIONS: dict[str, Callable[[Run], None]] = {
    "supernet": run_supernet,
    "latency": run_latency,
    "search": run_search_stage,
    "fidelity": run_fidelity,
    "export": run_export,
    "retrain": run_retrain,
    "report": run_report,
}


def check_budget(run: Run) -> None:
    """Raises MoesaicError when no architecture can meet a budget, before hours of training are spent on it.

    Threshold routers are priced as if each token needed one expert: what training will make of them is not known
    yet, and a budget that may turn out possible is not refused.
    """
    one_expert = Occupancy(
        {
            (layer, experts, router): even(experts, 1)
            for layer, experts, router in routers(run.space)
            if router.kind == "threshold"
        }
    )
    predictor = None
    if any("latency" in part.config.budget for part in run.parts()):
        with stopwatch() as seconds:
            folder = calibrated(run)
        run.spent_ahead["latency"] = seconds[0]
        predictor = LatencyPredictor.load(folder / "predictor.json", run.device.fingerprint, str(run.device))
    pricer = Pricer(run.context, one_expert, predictor)
    for part in run.parts():
        a_member_inside(run.space, resolve_budget(part.config, run.space, pricer))


def run_stages(run: Run, console: Console, only: str | None = None, fresh: bool = False) -> None:
    """Run stage ``only``, or all stages, and print the results after the last one.

    Of several budgets, stages after the search run for each in turn.
    """
    with run.directory.locked():
        describe(run)
        if only in (None, "supernet", "search") and not run.stages["search"].complete:
            check_mirror(run)
            check_budget(run)
        chosen = (only,) if only else STAGES
        for name in chosen:
            if name in SHARED_STAGES:
                _run_stage(name, run, fresh)
        for part in run.parts():
            if part.name and set(chosen) - set(SHARED_STAGES):
                run.reporter.say(f"budget {part.name}: in {part.path}")
                describe(part)
            for name in chosen:
                if name not in SHARED_STAGES:
                    _run_stage(name, part, fresh)
            if only in (None, "report"):
                if not (part.path / "summary.json").exists():
                    write_json(part.path / "summary.json", build_summary(part))
                print_summary(console, read_json(part.path / "summary.json"), part)


def describe(run: Run) -> None:
    """Leaves in the run's folder what it was asked, and with which versions on which device."""
    write_text(run.path / "config.yaml", run.loaded.resolved_yaml())
    write_json(run.path / "env.json", {"command": sys.argv[1:], "versions": versions(), "device": str(run.device)})


def _run_stage(name: str, run: Run, fresh: bool) -> None:
    if run.should_stop():
        raise Interrupted(f"stopped before stage {name}; the same command continues there")
    if name == "latency":
        run_latency(run, fresh)
    else:
        _FUNCTIONS[name](run)
