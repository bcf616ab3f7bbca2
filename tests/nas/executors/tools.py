"""Executors of two kinds with small lanes, and a search on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.nas.config import DeviceConfig, ExecutorConfig, LaneResources, SearchConfig
from moesaic.nas.executors.ray_lanes import RayExecutor
from moesaic.nas.executors.tune_trials import TuneExecutor
from moesaic.nas.search.budget import find_feasible
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.loop import BudgetSearch, run_search
from moesaic.nas.search.samplers import make_sampler
from moesaic.nas.search.trials import TrialLog, read_trials
from moesaic.supernet import Judge
from tests.nas.search_tools import budget_of, tiny_space

DEVICE = DeviceConfig(device="cpu", threads=1)
HALF = LaneResources(cpu=0.5)
EXECUTORS = {"ray": RayExecutor, "tune": TuneExecutor}
KINDS = pytest.mark.parametrize("kind", EXECUTORS)


def lanes(kind: str, count: int, **changes) -> ExecutorConfig:
    return ExecutorConfig(kind=kind, lanes=count, **{"resources": HALF, **changes})


def make(config: ExecutorConfig, judge: Judge, say=lambda text: None):
    return EXECUTORS[config.kind](config, judge, DEVICE, say)


def run(executor, path: Path, trials: int = 30, should_stop=lambda: False):
    """A search on ``executor``; returns its log's trials."""
    space = tiny_space()
    budget = budget_of(space, flops="60%")
    config = SearchConfig(sampler="evolution", trials=trials, population=8)
    log = TrialLog(path)
    try:
        feasible = FeasibleSampler(space, budget, find_feasible(space, budget))
        one = BudgetSearch("", budget, lambda history: make_sampler(config, feasible, 0, history), log.trials)
        run_search(config, [one], executor, log, should_stop=should_stop)
    finally:
        log.close()
        executor.close()
    return read_trials(path)


def whole(trials, count: int) -> None:
    """Complete, nothing twice, nothing above the budget, the file as the memory."""
    ended = [t for t in trials if t.state in ("evaluated", "failed")]
    assert len(ended) == len({t.architecture for t in ended}) == count
    assert [t.number for t in trials] == list(range(len(trials)))
    assert budget_of(tiny_space(), flops="60%").fits(ended[-1].architecture)
    assert all(budget_of(tiny_space(), flops="60%").fits(t.architecture) for t in ended)
    assert all((t.loss is None) == (t.state == "failed") == (t.reason is not None) for t in ended)
