"""Who proposes the next architecture: random, evolution over architectures, or Optuna's NSGA-II and TPE.

Every sampler is a function of the seed, the trials so far and what is running, with no other state: rebuilt from the
trial log it goes on exactly as it would have. With several lanes, which trial ends first is up to the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from nas.config import SearchConfig
from nas.search.feasible import FeasibleSampler
from nas.search.pareto import crowding, ranks
from nas.search.proposal import UNSEEN_TRIES, Progress, Proposal, Sampler, Skipped
from nas.search.rivals import uniform_layouts
from nas.search.trials import Trial
from search_spaces import Architecture, Router, crossover, mutate


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


@dataclass
class EvolutionSampler:
    """Evolution over architectures themselves.

    The first ``population`` are the ``seeds`` and random ones. Then tournaments over everything feasible so far choose
    parents: half of them by non-dominated rank and crowding, which widens the front, and half by loss, since what the
    budget is spent on in the end is the member of least loss. Half of the children are crossed layer by layer, all
    are mutated by one to three structural steps; a child over budget is repaired, and none is evaluated twice.

    AutoMoE (arXiv 2210.07535) and HAT evolve with a fitness of loss alone, re-evaluate parents in each generation, and
    change parents in place; here an architecture is a value and the archive is the population.
    """

    feasible: FeasibleSampler
    seed: int
    population: int
    seeds: tuple[Architecture, ...] = ()

    def propose(self, progress: Progress) -> Proposal | None:
        rng = Random(f"{self.seed}/search/{progress.asked}")
        for seed in self.seeds:
            if progress.unknown(seed):
                return Proposal(seed)
        archive = [trial for trial in progress.trials if trial.feasible]
        if progress.asked < self.population or len(archive) < 2:
            return RandomSampler(self.feasible, self.seed).propose(progress)
        points = np.array([trial.values for trial in archive])
        losses = np.array([trial.loss for trial in archive])
        orders = (_preference(points), losses.argsort(kind="stable").argsort())
        space = self.feasible.space
        refused: list[Skipped] = []
        for _ in range(UNSEEN_TRIES):
            order = rng.choice(orders)
            first, second = (archive[self._tournament(order, rng)].architecture for _ in range(2))
            child = crossover(space, first, second, rng) if rng.random() < 0.5 else first
            child = mutate(space, child, rng, steps=rng.randint(1, 3))
            if not self.feasible.budget.fits(child):
                refused.append(Skipped("refused", child))
                child = self.feasible.repair(child, rng)
            if progress.unknown(child):
                return Proposal(child, tuple(refused))
        return RandomSampler(self.feasible, self.seed).propose(progress)

    def observe(self, trial: Trial) -> None:
        pass

    @staticmethod
    def _tournament(order: np.ndarray, rng: Random) -> int:
        """The most preferred of four random members; ``order[i]`` is the place of member i."""
        return min((rng.randrange(len(order)) for _ in range(4)), key=lambda i: order[i])


def _preference(points: np.ndarray) -> np.ndarray:
    """[n] place of each point: by rank, then by falling crowding distance within its rank."""
    rank = ranks(points)
    distance = np.zeros(len(points))
    for value in np.unique(rank):
        members = np.flatnonzero(rank == value)
        distance[members] = crowding(points[members])
    places = np.empty(len(points), dtype=int)
    places[np.lexsort((-distance, rank))] = np.arange(len(points))
    return places


def seed_layouts(feasible: FeasibleSampler, count: int) -> tuple[Architecture, ...]:
    """Members inside the budget that people would pick by habit: uniform top-2 layouts and dense ones, half each, those
    of most FLOPs. A search that starts from them ends no worse than they are."""
    budget, found = feasible.budget, []
    for sparse, share in ((True, count - count // 2), (False, count // 2)):
        habit = Router("top_k", k=2) if sparse else None
        layouts = [
            a for a in uniform_layouts(feasible.space, sparse) if a.decoder.layers[0].feed_forward.router == habit
        ]
        inside = [a for a in layouts if a in feasible.space and budget.fits(a)]
        inside.sort(key=lambda a: (-budget.pricer.expected(a)["flops"], a.fingerprint))
        found += inside[:share]
    return tuple(found)


def make_sampler(config: SearchConfig, feasible: FeasibleSampler, seed: int, history: Sequence[Trial]) -> Sampler:
    """The sampler that ``config`` names, as it is after the trials of ``history``, in the order of their log."""
    if config.sampler == "random":
        return RandomSampler(feasible, seed)
    if config.sampler == "evolution":
        return EvolutionSampler(feasible, seed, config.population, seed_layouts(feasible, config.population // 2))
    from nas.search.optuna_sampler import OptunaSampler

    return OptunaSampler(feasible, seed, config, history)
