"""What a sampler is: it proposes an architecture inside the budget, and says what it passed over on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import Architecture

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


@dataclass(frozen=True)
class SearchState:
    """What a sampler may know when it proposes: all finished trials in the order of the log, those that were evaluated
    or failed by fingerprint (``seen``), and the proposals that are ``running`` in other lanes."""

    trials: list[Trial]
    seen: dict[str, Trial]
    running: tuple[Architecture, ...] = ()

    @property
    def asked(self) -> int:
        """Evaluations finished or running: with one lane, what the next one's number follows from."""
        return len(self.seen) + len(self.running)

    def unknown(self, architecture: Architecture) -> bool:
        """Neither evaluated nor running."""
        return architecture.fingerprint not in self.seen and architecture not in self.running


class Sampler(Protocol):
    """A function of its seed and of what it may know: rebuilt from a log, it proposes what it would have."""

    def propose(self, state: SearchState) -> Proposal | None:
        """The next unknown architecture inside the budget; None when none is found."""
        ...
