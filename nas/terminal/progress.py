"""Progress of a stage: a live line in a terminal, an occasional plain line anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

_PLAIN_SECONDS = 10.0
"""Seconds between lines where there is no terminal."""


class ProgressBar(Protocol):
    """Reports how far one stage is."""

    def update(self, done: int, total: int, facts: str = "") -> None: ...


class Reporter:
    """Prints messages and runs progress displays on one console (standard error, so that output can be piped)."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(Text(text))

    @contextmanager
    def progress(self, stage: str) -> Iterator[ProgressBar]:
        """A progress bar for one stage: name, step, figures, elapsed time, time left."""
        if not self.console.is_terminal:
            yield _PlainBar(self, stage)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield _LiveBar(progress, stage)


class _Clock:
    """Time left at the mean pace since this process first reported (a resumed stage starts in the middle)."""

    def __init__(self) -> None:
        self.first: tuple[float, int] | None = None

    def left(self, done: int, total: int) -> str:
        now = time.monotonic()
        if self.first is None:
            self.first = (now, done)
        start, first_done = self.first
        if done <= first_done:
            return ""
        seconds = (now - start) / (done - first_done) * (total - done)
        return f"{duration(seconds)} left"


class _LiveBar:
    def __init__(self, progress: Progress, stage: str):
        self._progress, self._clock = progress, _Clock()
        self._task = progress.add_task(stage, total=None, facts="", left="")

    def update(self, done: int, total: int, facts: str = "") -> None:
        left = self._clock.left(done, total)
        self._progress.update(self._task, completed=done, total=total, facts=facts, left=left)


class _PlainBar:
    def __init__(self, reporter: Reporter, stage: str):
        self._reporter, self._stage, self._clock = reporter, stage, _Clock()
        self._last = 0.0
        reporter.say(f"{stage}: started")

    def update(self, done: int, total: int, facts: str = "") -> None:
        left = self._clock.left(done, total)
        if time.monotonic() - self._last < _PLAIN_SECONDS and done < total:
            return
        self._last = time.monotonic()
        parts = [f"{self._stage}: {done}/{total}", facts, left if done < total else ""]
        self._reporter.say("  ".join(part for part in parts if part))


def duration(seconds: float) -> str:
    """``1:05`` or ``2:03:10``."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
