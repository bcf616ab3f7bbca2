"""Progress of a command: its stages, and in each a live line in a terminal, an occasional plain line anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column
from rich.text import Text

_PLAIN_SECONDS = 10.0
"""Seconds between lines where there is no terminal."""
_WIDE = 120
"""Columns of a terminal from which there is room for a bar beside the figures."""


class ProgressBar(Protocol):
    """Reports how far one stage is."""

    def update(self, done: int, total: int, facts: str = "") -> None: ...


class Stages:
    """Where a command is among its stages, and the time it still takes at the pace so far.

    ``stages`` are names with amounts of work, in a unit that takes about as long in every stage; 0 for little work.
    """

    def __init__(self, stages: Sequence[tuple[str, float]]):
        self._stages, self._place, self._entered = stages, -1, 0.0
        self._work = self._seconds = 0.0

    @property
    def _among_several(self) -> bool:
        return len(self._stages) > 1 and self._place >= 0

    def enter(self) -> None:
        """The next stage begins."""
        self._place, self._entered = self._place + 1, time.monotonic()

    def leave(self, seconds: float) -> None:
        """The stage took ``seconds``; those of stages with work give the pace."""
        if work := self._stages[self._place][1]:
            self._work, self._seconds = self._work + work, self._seconds + seconds

    def label(self, name: str) -> str:
        """``stage 3 of 7, search``; ``name`` alone where there is one stage."""
        return f"stage {self._place + 1} of {len(self._stages)}, {name}" if self._among_several else name

    def left(self, name: str, left: float, whole: float) -> float | None:
        """Seconds left in all, where the part ``name`` of the stage has ``left`` of ``whole``. None where that is not
        known yet, or says nothing new because there is one stage."""
        if not self._among_several:
            return None
        stage, work = self._stages[self._place]
        later = sum(work for _, work in self._stages[self._place + 1 :])
        if self._work:
            pace = self._seconds / self._work
        elif name == stage and work:
            pace = whole / work
        else:
            return None if later else left
        rest = work * pace - (time.monotonic() - self._entered)  # of this stage
        return (left if name == stage else max(left, rest)) + later * pace


class Reporter:
    """Prints messages and runs progress displays on one console (standard error, so that output can be piped).

    ``stages`` are those of the command in progress.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.stages = Stages([])

    def say(self, text: str) -> None:
        self.console.print(Text(text))

    @contextmanager
    def progress(self, stage: str) -> Iterator[ProgressBar]:
        """A progress bar for one stage, or a part of it: name, step, figures, time left."""
        clock, label = _Clock(self.stages, stage), self.stages.label(stage)
        if not self.console.is_terminal:
            yield _PlainBar(self, label, clock)
            return
        bar = [BarColumn(bar_width=24)] if self.console.width >= _WIDE else []
        text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=False, overflow="fold"))
        with Progress(SpinnerColumn(), *bar, text, console=self.console, transient=True) as progress:
            yield _LiveBar(progress, label, clock)


class _Clock:
    """Time left at the mean pace since this process first reported (a resumed stage starts in the middle)."""

    def __init__(self, stages: Stages, name: str) -> None:
        self._stages, self._name = stages, name
        self.first: tuple[float, int] | None = None

    def left(self, done: int, total: int) -> str:
        now = time.monotonic()
        if self.first is None:
            self.first = (now, done)
        start, first_done = self.first
        if done <= first_done:
            return ""
        pace = (now - start) / (done - first_done)
        here = pace * (total - done)
        everything = self._stages.left(self._name, here, pace * total)
        in_all = "" if everything is None else f", about {duration(everything)} in all"
        return f"{duration(here)} left{in_all}"


class _LiveBar:
    def __init__(self, progress: Progress, label: str, clock: _Clock):
        self._progress, self._label, self._clock = progress, label, clock
        self._task = progress.add_task(label, total=None)

    def update(self, done: int, total: int, facts: str = "") -> None:
        line = _line(self._label, done, total, facts, self._clock.left(done, total))
        self._progress.update(self._task, completed=done, total=total, description=line)


class _PlainBar:
    def __init__(self, reporter: Reporter, label: str, clock: _Clock):
        self._reporter, self._label, self._clock = reporter, label, clock
        self._last = 0.0
        reporter.say(f"{label}: started")

    def update(self, done: int, total: int, facts: str = "") -> None:
        left = self._clock.left(done, total)
        if time.monotonic() - self._last < _PLAIN_SECONDS and done < total:
            return
        self._last = time.monotonic()
        self._reporter.say(_line(self._label, done, total, facts, left if done < total else ""))


def _line(label: str, done: int, total: int, facts: str, left: str) -> str:
    return "  ".join(filter(None, [f"{label}: {done}/{total}", facts, left]))


def duration(seconds: float) -> str:
    """``1:05`` or ``2:03:10``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
