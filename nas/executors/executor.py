"""The interface of an executor: it takes architectures from a piece of work, and tells it each outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from moesaic.search_spaces import Architecture
from moesaic.supernet.evaluate import Evaluation


@dataclass(frozen=True)
class Outcome:
    """One evaluation that ended.

    ``evaluation`` is None where it failed, and ``reason`` says why. The failure is ``transient`` where another attempt
    may succeed: a dead lane, a time limit, memory that ran out. ``attempts`` counts the lanes it used: more than one if
    a lane died. ``seconds`` is the time of the last attempt in its lane, without transport.
    """

    architecture: Architecture
    evaluation: Evaluation | None
    lane: int
    seconds: float
    attempts: int = 1
    reason: str | None = None
    transient: bool = False


class Work(Protocol):
    """Architectures to evaluate, all different while they run."""

    def ask(self) -> Architecture | None:
        """The next architecture; None while there is none, which is final once nothing runs."""
        ...

    def tell(self, outcome: Outcome) -> None:
        """The outcome of an architecture that was asked for."""
        ...


class Executor(Protocol):
    """Evaluations in ``lanes`` lanes. Lanes do not wait for one another."""

    lanes: int

    def run(self, work: Work) -> None:
        """Evaluate whatever ``work`` gives, until it gives nothing and all evaluations have ended. Both methods of
        ``work`` are called in this thread; what they raise ends the run."""
        ...

    def close(self) -> None:
        """Release the lanes; running evaluations are dropped."""
        ...


def evaluate_all(
    executor: Executor, architectures: Sequence[Architecture], on_outcome: Callable[[int], None] = lambda done: None
) -> list[Outcome]:
    """The outcome of each architecture (all different), in their order, using all lanes. ``on_outcome`` gets how many
    have ended; what it raises ends the rest."""
    work = _List(architectures, on_outcome)
    executor.run(work)
    return [work.outcomes[architecture] for architecture in architectures]


class _List:
    """Given architectures as work."""

    def __init__(self, architectures: Sequence[Architecture], on_outcome: Callable[[int], None]):
        self._left, self._on_outcome = iter(architectures), on_outcome
        self.outcomes: dict[Architecture, Outcome] = {}

    def ask(self) -> Architecture | None:
        return next(self._left, None)

    def tell(self, outcome: Outcome) -> None:
        self.outcomes[outcome.architecture] = outcome
        self._on_outcome(len(self.outcomes))
