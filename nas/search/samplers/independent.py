"""Independent random draws inside the budget."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.proposal import UNSEEN_TRIES, Progress, Proposal
from moesaic.nas.search.trials import Trial


@dataclass
class RandomSampler:
    """Independent draws inside the budget."""

    feasible: FeasibleSampler
    seed: int

    def propose(self, progress: Progress) -> Proposal | None:
        rng = Random(f"{self.seed}/search/{progress.asked}")
        for _ in range(UNSEEN_TRIES):
            architecture = self.feasible.sample(rng)
            if progress.unknown(architecture):
                return Proposal(architecture)
        return None

    def observe(self, trial: Trial) -> None:
        pass
