"""Draws random architectures inside a budget, without wasting evaluations and without bias towards its edge."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from moesaic.nas.search.budget import Budget
from moesaic.search_spaces import Architecture, SearchSpace, mutate, neighbours

_TRIES = 64
"""Rejections before a walk: with more than about 5 % of the space inside, a draw nearly always succeeds earlier."""
_WALK = 60
"""Accepted or refused steps of a walk; about one per choice of a medium architecture."""


@dataclass(frozen=True)
class FeasibleSampler:
    """Random members inside a budget.

    Draws are rejected until one fits, which keeps the distribution exact. Where too little of the space fits, a
    Metropolis walk inside the budget is used instead. It starts at ``inside``, a member that fits, forgets its start,
    has no bias towards the edge, and has a bounded cost.
    """

    space: SearchSpace
    budget: Budget
    inside: Architecture

    def sample(self, rng: Random) -> Architecture:
        for _ in range(_TRIES):
            architecture = self.space.sample_balanced(rng)
            if self.budget.fits(architecture):
                return architecture
        return self.walk(self.inside, rng)

    def acceptance(self, draws: int, rng: Random) -> float:
        """Share of random members that fit."""
        return sum(self.budget.fits(self.space.sample_balanced(rng)) for _ in range(draws)) / draws

    def walk(self, start: Architecture, rng: Random) -> Architecture:
        """A walk inside the budget from ``start``, which must fit."""
        for _ in range(_WALK):
            step = mutate(self.space, start, rng)
            if self.budget.fits(step):
                start = step
        return start

    def repair(self, architecture: Architecture, rng: Random) -> Architecture:
        """The architecture itself if it fits; otherwise the result of as few random steps as needed, each of which
        reduces the worst excess, so that a repaired child keeps most of its parents."""
        excess = max(self.budget.excess(architecture).values())
        while excess > 0:
            candidates = neighbours(self.space, architecture)
            rng.shuffle(candidates)
            for candidate in candidates:
                lower = max(self.budget.excess(candidate).values())
                if lower < excess:
                    architecture, excess = candidate, lower
                    break
            else:
                return self.walk(self.inside, rng)
        return architecture
