"""Progress: where a command is among its stages, and what it says of the time left."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text

from moesaic.nas.terminal import progress
from moesaic.nas.terminal.progress import Reporter, Stages

STAGES = [("supernet", 300.0), ("latency", 0.0), ("search", 100.0), ("retrain", 200.0)]


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Time that stands still unless a test moves it."""
    time = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: time.now))
    return time


def reporter_at(place: int, seconds: float) -> Reporter:
    """In the stage with number ``place``, after stages that took ``seconds`` per unit of work."""
    reporter = Reporter(Console(file=io.StringIO(), width=200))
    reporter.stages = Stages(STAGES)
    for _, work in STAGES[: place - 1]:
        reporter.stages.enter()
        reporter.stages.leave(work * seconds or 77.0)
    reporter.stages.enter()
    return reporter


def last_line(reporter: Reporter) -> str:
    assert isinstance(reporter.console.file, io.StringIO)
    return reporter.console.file.getvalue().splitlines()[-1]


def test_the_first_stage_gives_the_pace_of_the_others(clock):
    reporter = reporter_at(1, 0)
    with reporter.progress("supernet") as bar:
        bar.update(0, 60)
        clock.now += 30
        bar.update(20, 60, "loss 3.1")
    # 90 seconds for 300 units, 60 of them left; the other 300 units take as long again.
    assert last_line(reporter) == "stage 1 of 4, supernet: 20/60  loss 3.1  1:00 left, about 2:30 in all"


def test_later_stages_go_at_the_pace_of_finished_ones_and_short_ones_do_not_count(clock):
    reporter = reporter_at(3, 0.5)
    with reporter.progress("search") as bar:
        bar.update(0, 10)
        clock.now += 20
        bar.update(5, 10)
    assert last_line(reporter).endswith("stage 3 of 4, search: 5/10  0:20 left, about 2:00 in all")


def test_a_part_of_a_stage_is_followed_by_the_rest_of_it(clock):
    reporter = reporter_at(4, 0.5)  # the stage takes 100 seconds
    with reporter.progress("a part") as bar:
        bar.update(0, 10)
        clock.now += 20
        bar.update(8, 10)
    assert last_line(reporter).endswith("0:05 left, about 1:20 in all")


def test_nothing_is_estimated_before_a_pace_is_known(clock):
    reporter = Reporter(Console(file=io.StringIO(), width=200))
    reporter.stages = Stages([("latency", 0.0), ("supernet", 10.0)])
    reporter.stages.enter()
    with reporter.progress("latency") as bar:
        bar.update(0, 10)
        clock.now += 20
        bar.update(5, 10)
    assert last_line(reporter) == "stage 1 of 2, latency: 5/10  0:20 left"


@pytest.mark.parametrize("stages", [[], [("search", 3.0)]])
def test_a_stage_alone_has_no_number(clock, stages):
    reporter = Reporter(Console(file=io.StringIO(), width=200))
    reporter.stages = Stages(stages)
    if stages:
        reporter.stages.enter()
    with reporter.progress("search") as bar:
        bar.update(0, 10)
        clock.now += 20
        bar.update(5, 10)
    assert last_line(reporter) == "search: 5/10  0:20 left"


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_narrow_terminal_keeps_every_figure(clock, width):
    reporter = Reporter(Console(file=io.StringIO(), width=width, force_terminal=True))
    with reporter.progress("search") as bar:
        bar.update(0, 300)
        clock.now += 20
        bar.update(50, 300, "best loss 3.4567  refused 12")
    assert isinstance(reporter.console.file, io.StringIO)
    shown = " ".join(Text.from_ansi(reporter.console.file.getvalue()).plain.split())
    assert "search: 50/300 best loss 3.4567 refused 12 1:40 left" in shown
