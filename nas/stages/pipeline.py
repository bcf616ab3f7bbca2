"""All stages in order, or one of them; and the files of a run that belong to no stage."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from nas.costs.latency import LatencyPredictor
from nas.costs.price import Pricer
from nas.costs.use import Occupancy, even
from nas.run_directory import stopwatch
from nas.search.budget import a_member_inside, resolve_budget
from nas.stages.export import run_export
from nas.stages.fidelity import run_fidelity
from nas.stages.latency import calibrated, run_latency
from nas.stages.report import run_report
from nas.stages.retrain import run_retrain
from nas.stages.run import STAGES, Run
from nas.stages.search import run_search_stage
from nas.stages.supernet import routers, run_supernet
from nas.summary import build_summary, print_summary, versions
from search_spaces import Interrupted
from search_spaces.files import read_json, write_json, write_text

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
    """Raises MoesaicError when no architecture can meet the budget, before hours of training are spent on it.

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
    if "latency" in run.config.budget:
        with stopwatch() as seconds:
            folder = calibrated(run)
        run.spent_ahead["latency"] = seconds[0]
        predictor = LatencyPredictor.load(folder / "predictor.json", run.device.fingerprint, str(run.device))
    pricer = Pricer(run.context, one_expert, predictor)
    a_member_inside(run.space, resolve_budget(run.config, run.space, pricer))


def run_stages(run: Run, console: Console, only: str | None = None, fresh: bool = False) -> None:
    """Run stage ``only``, or all stages, and print the result after the last one."""
    with run.directory.locked():
        write_text(run.path / "config.yaml", run.loaded.resolved_yaml())
        write_json(run.path / "env.json", {"command": sys.argv[1:], "versions": versions(), "device": str(run.device)})
        if only in (None, "supernet", "search") and not run.stages["search"].complete:
            check_budget(run)
        for name in (only,) if only else STAGES:
            if run.should_stop():
                raise Interrupted(f"stopped before stage {name}; the same command continues there")
            if name == "latency":
                run_latency(run, fresh)
            else:
                _FUNCTIONS[name](run)
        if only in (None, "report"):
            if not (run.path / "summary.json").exists():
                write_json(run.path / "summary.json", build_summary(run))
            print_summary(console, read_json(run.path / "summary.json"), run)
