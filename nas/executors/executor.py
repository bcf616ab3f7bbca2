"""What an executor is: it takes architectures while it has a free lane, and gives back what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moesaic.search_spaces import Architecture
from moesaic.supernet.evaluate import Evaluation


@dataclass(frozen=True)
class Outcome:
    """One evaluation that ended.

    ``evaluation`` is None where there is none, and ``reason`` says why. ``attempts`` counts the lanes it took:
    more than one where a lane died under it. ``seconds`` are those of the last attempt in its lane, without transport.
    """

    architecture: Architecture
    evaluation: Evaluation | None
    lane: int
    seconds: float
    attempts: int = 1
    reason: str | None = None


class Executor(Protocol):
    """Evaluations in ``lanes`` lanes. No lane waits for another one."""

    lanes: int

    @property
    def free(self) -> int:
        """How many architectures are wanted now."""
        ...

    def submit(self, architecture: Architecture) -> None:
        """Start to evaluate; only while something is ``free``."""
        ...

    def next(self) -> Outcome:
        """Wait for the first of what was submitted to end."""
        ...

    def close(self) -> None:
        """Let go of the lanes; what still runs in them is dropped."""
        ...


def evaluate_all(executor: Executor, architectures: Sequence[Architecture]) -> list[Outcome]:
    """What becomes of each architecture (all different), in their order, with all lanes at work."""
    waiting = list(reversed(architectures))
    outcomes: dict[Architecture, Outcome] = {}
    while len(outcomes) < len(architectures):
        while waiting and executor.free:
            executor.submit(waiting.pop())
        outcome = executor.next()
        outcomes[outcome.architecture] = outcome
    return [outcomes[architecture] for architecture in architectures]
