"""Random architectures inside a budget, and the repair of those outside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

from moesaic.nas.costs.additive import AdditiveCosts
from moesaic.nas.search.budget import Budget
from moesaic.nas.search.tilted import TiltedLaw
from moesaic.search_spaces import Architecture, SearchSpace

Piece = tuple[str, str | int]
"""A stack, and its "width", "depth" or the number of a layer."""
_TRIES = 64
"""Rejections of a draw, and draws that tell whether rejection is enough."""
_RARE = 16
"""With fewer than this many of the first draws inside, all come from the tail, which is quicker then."""
_PROPOSALS = 2000
"""Proposals from the tail before a draw gives up."""


@dataclass(frozen=True)
class FeasibleSampler:
    """Random members inside a budget: the law of ``SearchSpace.sample_balanced``, given that the budget is met.

    Draws from the space are rejected until one fits. Where too little of the space fits, draws from its tail
    (``TiltedLaw``) have exactly the same law. ``inside`` is a member that fits.
    """

    space: SearchSpace
    budget: Budget
    inside: Architecture

    def sample(self, rng: Random) -> Architecture | None:
        """A member inside the budget; None if none was found in thousands of draws."""
        for _ in range(0 if self._rare else _TRIES):
            architecture = self.space.sample_balanced(rng)
            if self.budget.fits(architecture):
                return architecture
        for _ in range(_PROPOSALS):
            architecture, keep = self._tail.propose(rng)
            if rng.random() < keep and self.budget.fits(architecture):
                return architecture
        return None

    @cached_property
    def _rare(self) -> bool:
        return self.acceptance(_TRIES, Random("rare")) < _RARE / _TRIES

    @cached_property
    def _tail(self) -> TiltedLaw:
        lines = self.budget.lines
        costs = AdditiveCosts(self.space, self.budget.pricer, tuple((line.cost, line.bind) for line in lines))
        return TiltedLaw(costs, [line.limit / self.budget.margin(line) for line in lines])

    def acceptance(self, draws: int, rng: Random) -> float:
        """Share of random members that fit."""
        return sum(self.budget.fits(self.space.sample_balanced(rng)) for _ in range(draws)) / draws

    def repair(self, architecture: Architecture, rng: Random) -> Architecture:
        """The architecture itself if it fits; otherwise with widths, depths and layers of a random member inside, which
        come in random order, and no more of them than are needed to fit."""
        if self.budget.fits(architecture):
            return architecture
        donor = self.sample(rng) or self.inside
        order: list[Piece] = []
        for name, stack in donor.stacks.items():
            order += [(name, "width"), (name, "depth"), *((name, index) for index in range(len(stack.layers)))]
        rng.shuffle(order)
        kept, taken = 0, len(order)  # with all of them taken it is the donor, which fits
        while taken - kept > 1:
            middle = (kept + taken) // 2
            if self.budget.fits(self._mixed(architecture, donor, set(order[:middle]))):
                taken = middle
            else:
                kept = middle
        return self._mixed(architecture, donor, set(order[:taken]))

    def _mixed(
        self, architecture: Architecture, donor: Architecture, taken: set[tuple[str, str | int]]
    ) -> Architecture:
        """``architecture`` with what is ``taken`` from the donor, which also gives layers beyond its own."""
        stacks = {}
        for name, own in architecture.stacks.items():
            other = donor.stacks[name]
            width = (other if (name, "width") in taken else own).width
            layers = list((other if (name, "depth") in taken else own).layers)
            for index, layer in enumerate(own.layers[: len(layers)]):
                layers[index] = other.layers[index] if (name, index) in taken else layer
            stacks[name] = replace(own, width=width, layers=tuple(layers))
        return self.space.build(stacks)
