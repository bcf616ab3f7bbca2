"""Evolution directly on architectures, with a Gaussian process that chooses which child to evaluate."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from random import Random

import numpy as np

from moesaic.nas.costs.price import Costs
from moesaic.nas.search.budget import cheapest
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.pareto import non_dominated
from moesaic.nas.search.proposal import Proposal, SearchState
from moesaic.nas.search.rivals import uniform_layouts
from moesaic.nas.search.samplers.independent import RandomSampler
from moesaic.nas.search.samplers.surrogate import GaussianProcess, expected_gain, surrogate_features
from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import Architecture, Router, crossover, mutate

_CHILDREN, _RANDOM = 32, 8
"""Candidates for one evaluation, and how many of them are random, not children of the front: the best networks of the
next width may be several steps away."""
_LIMITS = 64
"""Number of random cost limits over which the growth of the front is averaged."""
_REMEMBERED = 300
"""The surrogate is fitted to this many latest evaluations, so that a proposal takes only milliseconds."""


@dataclass
class Archive:
    """Features and front of a log, updated with new trials only: a proposal after ten thousand takes no longer."""

    read: int = 0
    """Number of trials of the log that were read."""
    x: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    """Features and losses of the latest evaluations."""
    feasible: int = 0
    front: list[Trial] = field(default_factory=list)
    points: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    """[front, 1 + costs] loss and costs of the front."""
    low: np.ndarray = field(default_factory=lambda: np.array(np.inf))
    high: np.ndarray = field(default_factory=lambda: np.array(-np.inf))
    """[1 + costs] range over feasible trials."""

    def add(self, judged: Sequence[Trial], x: np.ndarray, points: np.ndarray) -> None:
        """Evaluated trials with their features [n, columns], loss and costs [n, 1 + costs]."""
        self.x.extend(x)
        self.losses.extend(points[:, 0])
        inside = np.array([trial.feasible for trial in judged])
        if not inside.any():
            return
        self.feasible += int(inside.sum())
        self.low, self.high = np.minimum(self.low, points[inside].min(0)), np.maximum(self.high, points[inside].max(0))
        candidates = [*self.front, *(trial for trial in judged if trial.feasible)]
        known = np.concatenate([self.points, points[inside]]) if self.front else points[inside]
        best = non_dominated(known)
        self.front = [trial for trial, keep in zip(candidates, best, strict=True) if keep]
        self.points = known[best]


@dataclass
class EvolutionSampler:
    """Evolution directly on architectures, with a surrogate that chooses which child to evaluate.

    The first ``population`` are the ``seeds`` and random ones. Then members of the front are crossed layer by layer and
    mutated by one to three structural steps. Of several such children inside the budget and a few random ones, the one
    evaluated is that with the largest expected growth of the front, under a Gaussian process of the losses.

    AutoMoE (arXiv 2210.07535) and HAT evolve with a fitness of loss alone, evaluate every child, parents again in each
    generation, and change parents in place; here an architecture is a value and the archive is the population.
    """

    feasible: FeasibleSampler
    seed: int
    population: int
    costs: tuple[str, ...]
    """Objectives besides the loss."""
    seeds: tuple[Architecture, ...] = ()
    _archive: Archive = field(default_factory=Archive, init=False, repr=False)

    def propose(self, state: SearchState) -> Proposal | None:
        rng = Random(f"{self.seed}/search/{state.asked}")
        for seed in self.seeds:
            if state.unknown(seed):
                return Proposal(seed)
        archive = self._archive
        self._read(state.trials)
        if state.asked >= self.population and archive.feasible > 1:
            children = self._children([trial.architecture for trial in archive.front], rng)
            gains = self._gains(children, state.running, self._limits(rng))
            for _, child in sorted(zip(-gains, children, strict=True), key=itemgetter(0)):
                if state.unknown(child):
                    return Proposal(child)
        return RandomSampler(self.feasible, self.seed).propose(state)

    def _children(self, parents: Sequence[Architecture], rng: Random) -> dict[Architecture, Costs]:
        """Distinct candidates inside the budget, as many as a number of tries gives, and their expected costs."""
        space, budget = self.feasible.space, self.feasible.budget
        drawn = (self.feasible.sample(rng) for _ in range(_RANDOM))
        children = self._priced(architecture for architecture in drawn if architecture is not None)
        for _ in range(4 * _CHILDREN):
            first, second = rng.choice(parents), rng.choice(parents)
            child = crossover(space, first, second, rng) if rng.random() < 0.5 else first
            child = mutate(space, child, rng, steps=rng.randint(1, 3))
            if child not in children and budget.fits(child, costs := budget.pricer.expected(child)):
                children[child] = costs
            if len(children) == _CHILDREN:
                break
        return children

    def _read(self, trials: Sequence[Trial]) -> None:
        """Read the trials that are new in the log."""
        new = trials[self._archive.read :]
        self._archive.read = len(trials)
        judged = [trial for trial in new if trial.state == "evaluated"]
        if judged:
            x, _ = self._described(self._priced(trial.architecture for trial in judged))
            points = [[trial.loss, *(trial.costs[name] for name in self.costs)] for trial in judged]
            self._archive.add(judged, x, np.array(points))

    def _limits(self, rng: Random) -> np.ndarray:
        """[limits, costs] random limits over the range of evaluated costs plus a tenth, so that the lowest loss
        overall also counts."""
        low, high = self._archive.low[1:], self._archive.high[1:]
        shares = np.random.default_rng(rng.getrandbits(32)).random((_LIMITS, len(self.costs)))
        return low + 1.1 * (high - low) * shares

    def _gains(
        self, children: Mapping[Architecture, Costs], running: Sequence[Architecture], limits: np.ndarray
    ) -> np.ndarray:
        """[children] expected growth of the hypervolume of the front.

        Candidates running in other lanes count as finished with their expected loss, so that lanes explore different
        places (Kriging believer, Ginsbourger et al. 2010).
        """
        x, losses, front = np.stack(self._archive.x), np.array(self._archive.losses), self._archive.points
        process = GaussianProcess(x, losses)
        if running:
            believed, costs = self._described(self._priced(running))
            means, _ = process.predict(believed)
            process = GaussianProcess(np.concatenate([x, believed]), np.concatenate([losses, means]))
            front = np.concatenate([front, np.column_stack([means, costs])])
        described, costs = self._described(children)
        return expected_gain(*process.predict(described), costs, front, limits)

    def _priced(self, architectures: Iterable[Architecture]) -> dict[Architecture, Costs]:
        return {architecture: self.feasible.budget.pricer.expected(architecture) for architecture in architectures}

    def _described(self, priced: Mapping[Architecture, Costs]) -> tuple[np.ndarray, np.ndarray]:
        """Features [n, columns] and costs that are objectives [n, costs]."""
        pricer, slots = self.feasible.budget.pricer, self.feasible.space.layers
        x = [surrogate_features(pricer, architecture, costs, slots) for architecture, costs in priced.items()]
        return np.array(x), np.array([[costs[name] for name in self.costs] for costs in priced.values()])


def _routers(architecture: Architecture) -> list[Router | None]:
    return [layer.feed_forward.router for layer in architecture.layers.values()]


def corners(feasible: FeasibleSampler, costs: Sequence[str]) -> tuple[Architecture, ...]:
    """The cheapest member by each of ``costs``, if it is inside the budget: the ends of the front."""
    budget = feasible.budget
    found = [cheapest(feasible.space, budget.pricer, cost) for cost in costs]
    return tuple(a for a in dict.fromkeys(found) if budget.fits(a))


def seed_layouts(feasible: FeasibleSampler, count: int) -> tuple[Architecture, ...]:
    """The usual choices inside the budget: uniform top-2 and dense layouts, half each, those with most FLOPs. A search
    that starts from them ends no worse than they are."""
    budget, found = feasible.budget, []
    for sparse, share in ((True, count - count // 2), (False, count // 2)):
        layouts = [a for a in uniform_layouts(feasible.space, sparse) if a in feasible.space and budget.fits(a)]
        inside = [a for a in layouts if all(router is None or router.k == 2 for router in _routers(a))]
        inside.sort(key=lambda a: (-budget.pricer.expected(a)["flops"], a.fingerprint))
        found += inside[:share]
    return tuple(found)
