"""What a sampler is: it proposes an architecture inside the budget, and says what it passed over on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nas.search.trials import Trial
from search_spaces import Architecture

UNSEEN_TRIES = 200
"""Proposals in a row that may turn out seen before, after which the space inside the budget counts as exhausted."""


@dataclass(frozen=True)
class Skipped:
    """A proposal that was not evaluated: over budget, or known already."""

    state: Literal["refused", "duplicate"]
    architecture: Architecture
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """An architecture to evaluate, what came up on the way to it, and what the sampler wants kept in its trial."""

    architecture: Architecture
    skipped: tuple[Skipped, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)


class Sampler(Protocol):
    def propose(self, trials: list[Trial], seen: dict[str, Trial]) -> Proposal | None:
        """The next unseen architecture inside the budget; None when none is found."""
        ...

    def observe(self, trials: list[Trial]) -> None:
        """Trials that were just finished, in the order of the log."""
        ...
