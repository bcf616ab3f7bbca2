"""Drawing architectures inside a budget without wasting evaluations and without favouring its edge."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from moesaic.nas.search.budget import Budget
from moesaic.search_spaces import Architecture, SearchSpace, mutate, neighbours

_TRIES = 64
"""Rejections before a walk: with more than about 5 % of the space inside, a draw nearly always succeeds first."""
_WALK = 60
"""Accepted or refused steps of a walk; about one per choice of a medium architecture."""


@dataclass(frozen=True)
class FeasibleSampler:
    """Random members inside a budget.

    A draw is rejected until it fits, which keeps the distribution exact. Where too little of the space fits, the
    draw is a random walk inside the budget instead, from ``inside``, a member that fits: a Metropolis walk, which
    forgets its start and has no pull towards the edge, at a bounded price.
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
        """The architecture itself when it fits; otherwise random steps that each lessen the worst excess, as few
        as it takes, so that a repaired child keeps most of its parents."""
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
