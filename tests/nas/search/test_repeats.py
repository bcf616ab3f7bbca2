"""What a search evaluates again when it is started again, and what it says when there is nothing left to evaluate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from moesaic.nas.config import SearchConfig
from moesaic.nas.executors import Outcome, local
from moesaic.nas.search.loop import to_repeat, without_repeated
from moesaic.nas.search.trials import Trial, read_trials
from moesaic.search_spaces import Architecture, Interrupted, StageFailed
from moesaic.supernet import Evaluation
from tests.nas.search_tools import Stop, budget_of, formula, search, small_space, tiny_space

Sampler = Literal["random", "nsga2", "evolution", "puzzle"]
SAMPLERS: tuple[Sampler, ...] = ("random", "nsga2", "evolution", "puzzle")


class Machine:
    """Evaluates by formula. Evaluations whose number, from 1, is in ``errors`` raise that error, and so do all from
    number ``broken``."""

    def __init__(self, errors: dict[int, Exception] | None = None, broken: int | None = None):
        self.errors, self.broken, self.number = errors or {}, broken, 0
        self.seen: list[Architecture] = []

    def __call__(self, architecture: Architecture) -> Evaluation:
        self.number += 1
        self.seen.append(architecture)
        if self.number in self.errors:
            raise self.errors[self.number]
        if self.broken is not None and self.number >= self.broken:
            raise RuntimeError("the kernel needs another GPU")
        return formula(architecture)


def start(
    path: Path, machine: Callable, trials: int = 60, stop: int = 10**6, sampler: Sampler = "random"
) -> list[Trial]:
    """One start of the same search; returns the log. A stop or a failed stage ends it as it ends the command."""
    space, config = tiny_space(), SearchConfig(sampler=sampler, trials=trials, population=8)
    return search(space, budget_of(space, flops="60%"), path, config, machine, Stop(stop))


def evaluated(trials: list[Trial]) -> set[Architecture]:
    return {trial.architecture for trial in trials if trial.state == "evaluated"}


@pytest.mark.parametrize("good", [0, 30])
def test_a_broken_machine_costs_no_trials_however_often_the_command_is_given(good, tmp_path):
    log = tmp_path / "t.jsonl"
    with pytest.raises(StageFailed, match="20 evaluations in a row failed") as caught:
        start(log, Machine(broken=good + 1))
    assert caught.value.found == "RuntimeError: the kernel needs another GPU"
    failed = [t.architecture for t in read_trials(log) if t.state == "failed"]
    assert len(failed) == 20
    again = Machine(broken=1)
    with pytest.raises(StageFailed, match="20 evaluations in a row failed"):
        start(log, again)
    assert again.seen == failed
    mended = Machine()
    trials = start(log, mended)
    assert mended.seen[:20] == failed
    assert len(mended.seen) == len(set(mended.seen)) == 60 - good
    assert len(evaluated(trials)) == 60


def test_failures_that_may_pass_are_repeated_and_others_are_final(tmp_path):
    errors = {
        3: MemoryError("no memory"),
        5: RuntimeError("this kernel refuses the shape"),
        7: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        8: ZeroDivisionError("division by zero"),
    }
    first = Machine(errors)
    with pytest.raises(Interrupted, match="stopped after 10 of 60"):
        start(tmp_path / "t.jsonl", first, stop=10)
    second = Machine()
    trials = start(tmp_path / "t.jsonl", second)
    assert second.seen[:2] == [first.seen[2], first.seen[6]]
    assert len(second.seen) == 52
    final = {first.seen[4], first.seen[7]}
    assert evaluated(trials) == {*first.seen, *second.seen} - final
    assert [t.state for t in trials].count("failed") == 4
    counted = without_repeated(trials)
    assert len(counted) == len({t.architecture for t in counted}) == 60
    assert {t.architecture for t in counted if t.state == "failed"} == final


def test_a_stop_before_the_repeats_leaves_the_search_unfinished(tmp_path):
    start_errors = {10: MemoryError("no memory")}
    with pytest.raises(Interrupted):
        start(tmp_path / "t.jsonl", Machine(start_errors), trials=11, stop=10)
    with pytest.raises(Interrupted, match="stopped after 9 of 11"):
        start(tmp_path / "t.jsonl", Machine(), trials=11, stop=0)
    assert len(evaluated(start(tmp_path / "t.jsonl", Machine(), trials=11))) == 11


def test_what_lanes_report_as_transient_is_repeated(tmp_path, monkeypatch):
    """Dead lanes and time limits, from whatever executor."""

    def attempt(evaluate, architecture: Architecture, lane: int) -> Outcome:
        return Outcome(architecture, None, lane, 1.0, reason="took longer", transient=True)

    with monkeypatch.context() as patched, pytest.raises(StageFailed):
        patched.setattr(local, "attempt", attempt)
        start(tmp_path / "t.jsonl", formula)
    (line, *_) = read_trials(tmp_path / "t.jsonl")
    assert (line.transient, line.reason) == (True, "took longer")
    assert len(to_repeat(read_trials(tmp_path / "t.jsonl"))) == 20
    assert len(evaluated(start(tmp_path / "t.jsonl", formula))) == 60


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_with_repeats_can_itself_be_interrupted_anywhere(sampler: Sampler, tmp_path):
    """The log alone decides: one more stop changes nothing."""
    logs = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    for log in logs:
        errors: dict[int, Exception] = {n: MemoryError("no memory") for n in (2, 6, 11)}
        with pytest.raises(Interrupted):
            start(log, Machine(errors), 40, 12, sampler)
    with pytest.raises(Interrupted):
        start(logs[1], Machine(), 40, 11, sampler)
    one, two = (start(log, Machine(), 40, sampler=sampler) for log in logs)
    assert [(t.architecture, t.state, t.values) for t in one] == [(t.architecture, t.state, t.values) for t in two]
    assert len(evaluated(one)) == 40


@pytest.mark.parametrize("sampler", ["random", "evolution"])
def test_a_space_with_nothing_left_is_said_once(sampler: Sampler, tmp_path):
    space, said = small_space(), []
    budget = budget_of(space, flops="45%")
    members = {architecture for architecture in space if budget.fits(architecture)}
    config = SearchConfig(sampler=sampler, trials=len(members) + 64, population=8)
    trials = search(space, budget, tmp_path / "t.jsonl", config, say=said.append)
    found = evaluated(trials)
    assert found <= members
    assert said == [
        f"search: ends after {len(found)} of {config.trials} trials: no other architecture was found inside budget"
    ]
    assert len(found) > 0.8 * len(members)  # some members are drawn rarely
