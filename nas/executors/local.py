"""The executor of one process: each architecture is evaluated in this process."""

from __future__ import annotations

import time
from collections.abc import Callable

from moesaic.nas.executors.executor import Outcome
from moesaic.search_spaces import Architecture
from moesaic.supernet.evaluate import Evaluation


class LocalExecutor:
    """One lane, this process."""

    lanes = 1

    def __init__(self, evaluate: Callable[[Architecture], Evaluation]):
        self._evaluate = evaluate
        self._submitted: Architecture | None = None

    @property
    def free(self) -> int:
        return int(self._submitted is None)

    def submit(self, architecture: Architecture) -> None:
        assert self._submitted is None, "the lane is taken"
        self._submitted = architecture

    def next(self) -> Outcome:
        architecture, self._submitted = self._submitted, None
        assert architecture is not None, "nothing was submitted"
        return attempt(self._evaluate, architecture, lane=0)

    def close(self) -> None:
        pass


def attempt(evaluate: Callable[[Architecture], Evaluation], architecture: Architecture, lane: int) -> Outcome:
    """Evaluate; an error (out of memory, a kernel that refuses a shape) fails this architecture's evaluation, not the
    search."""
    started = time.perf_counter()
    evaluation, reason = None, None
    try:
        evaluation = evaluate(architecture)
    except (RuntimeError, MemoryError, ArithmeticError) as error:  # running out of memory is one of the first two
        reason = f"{type(error).__name__}: {str(error).strip()}"[:300]
    return Outcome(architecture, evaluation, lane, time.perf_counter() - started, reason=reason)
