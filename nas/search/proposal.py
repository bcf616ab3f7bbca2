"""The interface of a sampler: it proposes an architecture inside the budget, and reports the ones it skipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import Architecture

UNSEEN_TRIES = 200
"""After this many known proposals in a row, the space inside the budget counts as exhausted."""


@dataclass(frozen=True)
class Skipped:
    """A proposal that was not evaluated: over budget, or already known."""

    state: Literal["refused", "duplicate"]
    architecture: Architecture
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """An architecture to evaluate, the proposals skipped before it, and what the sampler stores in its trial."""

    architecture: Architecture
    skipped: tuple[Skipped, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchState:
    """What a sampler may use for a proposal: all finished trials in the order of the log, the evaluated or failed ones
    by fingerprint (``seen``), the proposals that are ``running`` in other lanes, and what samplers stored in the
    evaluations of this budget, finished or running (``own``). The others are of all budgets of the search."""

    trials: list[Trial]
    seen: dict[str, Trial]
    running: tuple[Architecture, ...] = ()
    own: tuple[Mapping[str, Any], ...] = ()

    @property
    def asked(self) -> int:
        """Number of evaluations finished or running; with one lane, it determines the next trial's number."""
        return len(self.seen) + sum(a.fingerprint not in self.seen for a in self.running)

    def unknown(self, architecture: Architecture) -> bool:
        """Whether the architecture is neither evaluated nor running."""
        return architecture.fingerprint not in self.seen and architecture not in self.running


class Sampler(Protocol):
    """A function of its seed and its knowledge: rebuilt from a log, it makes the same proposals."""

    def propose(self, state: SearchState) -> Proposal | None:
        """The next unknown architecture inside the budget; None when none is found."""
        ...
