"""What every executor must do. A suite is a subclass of ``ExecutorContract`` that makes one."""

from __future__ import annotations

import itertools
import os
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from moesaic.nas.config import SearchConfig
from moesaic.nas.executors import Executor, Outcome, evaluate_all
from moesaic.nas.search.budget import find_feasible
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.loop import BudgetSearch, run_search
from moesaic.nas.search.samplers import make_sampler
from moesaic.nas.search.trials import TrialLog, read_trials
from moesaic.search_spaces import Architecture, StageFailed
from moesaic.supernet import Judge
from tests.listeners import is_loopback, listening
from tests.nas.search_tools import budget_of, tiny_space


def members(count: int) -> list[Architecture]:
    return list(itertools.islice(iter(tiny_space()), 0, 500 * count, 500))


class Recorded:
    """Work that records what an executor does with it. With ``wait`` it has nothing more after the first architecture
    until that was told; at outcome ``fails_at`` it raises."""

    def __init__(self, architectures: list[Architecture], wait: bool = False, fails_at: int | None = None):
        self.left, self.wait, self.fails_at = list(architectures), wait, fails_at
        self.running: set[Architecture] = set()
        self.told: list[Architecture] = []
        self.most = 0

    def ask(self) -> Architecture | None:
        if not self.left or (self.wait and self.running and not self.told):
            return None
        architecture = self.left.pop()
        self.running.add(architecture)
        self.most = max(self.most, len(self.running))
        return architecture

    def tell(self, outcome: Outcome) -> None:
        self.running.remove(outcome.architecture)
        self.told.append(outcome.architecture)
        if len(self.told) == self.fails_at:
            raise StageFailed("the disk is full")


class ExecutorContract:
    def make(self, judge: Judge) -> Executor:
        """An executor that evaluates with ``judge``; its test closes it."""
        raise NotImplementedError

    @pytest.fixture
    def executor(self, judge: Judge):
        executor = self.make(judge)
        yield executor
        executor.close()

    def test_a_list_comes_back_in_its_order_with_the_judge_s_evaluations(self, executor: Executor, judge: Judge):
        architectures = members(8)
        counted: list[int] = []
        outcomes = evaluate_all(executor, architectures, counted.append)
        assert counted == list(range(1, 9))
        assert [outcome.architecture for outcome in outcomes] == architectures
        assert [outcome.evaluation for outcome in outcomes] == [judge(a) for a in architectures]
        assert {outcome.lane for outcome in outcomes} <= set(range(executor.lanes))
        assert all(outcome.attempts == 1 and outcome.reason is None for outcome in outcomes)
        assert all(outcome.seconds > 0 for outcome in outcomes)

    def test_it_takes_no_more_than_it_can_run_and_tells_each_once(self, executor: Executor):
        work = Recorded(members(7), wait=True)
        executor.run(work)
        assert sorted(a.fingerprint for a in work.told) == sorted(a.fingerprint for a in members(7))
        assert work.most <= executor.lanes + 1  # one may be ready before a lane is
        assert not work.running

    def test_nobody_outside_this_machine_can_reach_it(self, executor: Executor):
        executor.run(Recorded(members(2)))
        open_to_all = {address for address, _ in listening(os.getpid()) if not is_loopback(address)}
        assert open_to_all == set()

    def test_what_the_work_raises_ends_the_run(self, executor: Executor):
        with pytest.raises(StageFailed, match="the disk is full"):
            executor.run(Recorded(members(7), fails_at=3))

    def test_a_search_on_it_is_complete_and_inside_its_budget(self, executor: Executor, judge: Judge, tmp_path: Path):
        space, config = tiny_space(), SearchConfig(sampler="random", trials=12)
        budget = budget_of(space, flops="60%")
        feasible = FeasibleSampler(space, budget, find_feasible(space, budget))
        with closing(TrialLog(tmp_path / "t.jsonl")) as log:
            run_search(config, [BudgetSearch("", budget, partial(make_sampler, config, feasible, 0))], executor, log)
        trials = read_trials(tmp_path / "t.jsonl")
        assert [trial.number for trial in trials] == list(range(12))
        assert len({trial.architecture for trial in trials}) == 12
        for trial in trials:
            assert trial.state == "evaluated"
            assert budget.fits(trial.architecture)
            assert trial.loss == judge(trial.architecture).loss
