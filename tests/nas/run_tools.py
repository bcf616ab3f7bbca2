"""Runs inside the test's process, so that a fault can be put into them and what they say can be read."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from moesaic.nas.config import load_config
from moesaic.nas.pipeline import run_stages
from moesaic.nas.stages.engine import do
from moesaic.nas.stages.run import BudgetRun, Run
from moesaic.nas.stages.stage import BY_NAME
from moesaic.nas.terminal.progress import Reporter

QUICK = (
    "supernet.steps=6",
    "search.trials=24",
    "retrain.steps=6",
    "retrain.checkpoint_every=2",
    "export.front=2",
)


def open_run(config: Path, path: Path, *overrides: str, should_stop: Callable[[], bool] = lambda: False) -> Run:
    """A run of ``QUICK`` and ``overrides`` in ``path``; ``said`` reads what its reporter was told."""
    reporter = Reporter(Console(file=io.StringIO(), width=400))
    return Run(load_config(config, [*QUICK, *overrides]), path, reporter, should_stop)


def said(run: Run) -> str:
    file = run.reporter.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def finish(run: Run) -> str:
    """Do all stages that are left; returns what the terminal shows at the end."""
    out = io.StringIO()
    run_stages(run, Console(file=out, width=400))
    return out.getvalue()


def do_stage(run: Run | BudgetRun, name: str) -> None:
    """Do one stage of a run, or of one budget of it."""
    stage = BY_NAME[name]
    do(stage, run if stage.shared or isinstance(run, BudgetRun) else only(run))


def only(run: Run) -> BudgetRun:
    """What belongs to the only budget of a run."""
    (part,) = run.budgets
    return part


def without_stages(finished: Path, path: Path, *stages: str) -> Path:
    """A copy of a finished run's folder in ``path``, in which ``stages`` have yet to be done."""
    shutil.copytree(finished, path)
    for stage in stages:
        shutil.rmtree(path / stage)
    (path / "summary.json").unlink()
    return path
