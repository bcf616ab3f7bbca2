"""The interface of an executor: it takes architectures while it has a free lane, and returns each outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from moesaic.search_spaces import Architecture
from moesaic.supernet.evaluate import Evaluation


@dataclass(frozen=True)
class Outcome:
    """One evaluation that ended.

    ``evaluation`` is None where it failed, and ``reason`` says why. ``attempts`` counts the lanes it used: more than
    one if a lane died. ``seconds`` is the time of the last attempt in its lane, without transport.
    """

    architecture: Architecture
    evaluation: Evaluation | None
    lane: int
    seconds: float
    attempts: int = 1
    reason: str | None = None


class Executor(Protocol):
    """Evaluations in ``lanes`` lanes. Lanes do not wait for one another."""

    lanes: int

    @property
    def free(self) -> int:
        """How many more architectures can be submitted now."""
        ...

    def submit(self, architecture: Architecture) -> None:
        """Start an evaluation; only while ``free`` is positive."""
        ...

    def next(self) -> Outcome:
        """Wait for the first submitted evaluation to end."""
        ...

    def close(self) -> None:
        """Release the lanes; running evaluations are dropped."""
        ...


def evaluate_all(
    executor: Executor, architectures: Sequence[Architecture], on_outcome: Callable[[int], None] = lambda done: None
) -> list[Outcome]:
    """The outcome of each architecture (all different), in their order, using all lanes. ``on_outcome`` gets how many
    have ended."""
    waiting = list(reversed(architectures))
    outcomes: dict[Architecture, Outcome] = {}
    while len(outcomes) < len(architectures):
        while waiting and executor.free:
            executor.submit(waiting.pop())
        outcome = executor.next()
        outcomes[outcome.architecture] = outcome
        on_outcome(len(outcomes))
    return [outcomes[architecture] for architecture in architectures]
