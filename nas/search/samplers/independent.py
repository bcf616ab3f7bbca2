"""Independent random draws inside the budget."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.proposal import UNSEEN_TRIES, Proposal, SearchState


@dataclass
class RandomSampler:
    """Independent draws inside the budget."""

    feasible: FeasibleSampler
    seed: int

    def propose(self, state: SearchState) -> Proposal | None:
        rng = Random(f"{self.seed}/search/{state.asked}")
        for _ in range(UNSEEN_TRIES):
            architecture = self.feasible.sample(rng)
            if architecture is None:
                break
            if state.unknown(architecture):
                return Proposal(architecture)
        return None
