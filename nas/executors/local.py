"""The executor of one process: each architecture is evaluated in this process."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from moesaic.nas.executors.executor import Outcome, Work
from moesaic.search_spaces import Architecture
from moesaic.supernet.evaluate import Evaluation


class LocalExecutor:
    """One lane, this process."""

    lanes = 1

    def __init__(self, evaluate: Callable[[Architecture], Evaluation]):
        self._evaluate = evaluate

    def run(self, work: Work) -> None:
        while (architecture := work.ask()) is not None:
            work.tell(attempt(self._evaluate, architecture, lane=0))

    def close(self) -> None:
        pass


def attempt(evaluate: Callable[[Architecture], Evaluation], architecture: Architecture, lane: int) -> Outcome:
    """Evaluate; an error (out of memory, a kernel that refuses a shape) fails this architecture's evaluation, not the
    search."""
    started = time.perf_counter()
    evaluation, reason, transient = None, None, False
    try:
        evaluation = evaluate(architecture)
    except (RuntimeError, MemoryError, ArithmeticError) as error:  # running out of memory is one of the first two
        reason = f"{type(error).__name__}: {str(error).strip()}"[:300]
        transient = _is_transient(error)
    return Outcome(architecture, evaluation, lane, time.perf_counter() - started, reason=reason, transient=transient)


def _is_transient(error: Exception) -> bool:
    """Whether the state of the machine caused the error: too little memory, a failing GPU. For too little memory on a
    CPU, torch has no class of its own."""
    classes = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, classes) or "can't allocate memory" in str(error)
