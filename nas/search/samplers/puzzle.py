"""Puzzle (arXiv 2411.19146): score each part of a layer once, then find the best combination by integer programming.

A part is a layer's attention, cross-attention or feed-forward. Its score is the change in loss when it alone replaces
its counterpart in a parent. A model's loss is modelled as that of the parent at its width and depth plus the scores of
its parts, and its costs as such sums too. ``scipy.optimize.milp`` then finds the optimum under any limits, so a new
budget needs no new evaluation. Scores are ordinary trials in the log; ``additivity`` says how far the sums were from
the losses evaluated afterwards.

Puzzle's parent is a model far over the budget; here nothing over budget is evaluated. The parent is the uniform
network in which most single parts can be replaced inside the budget; its scores also add up best (docs/search.md).
A part that does not fit there is not chosen.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, product
from operator import le
from random import Random
from typing import Any

import numpy as np
from scipy.optimize import Bounds, milp

from moesaic.nas.search.budget import Budget
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.proposal import UNSEEN_TRIES, Proposal, SearchState
from moesaic.nas.search.rivals import uniform_layouts
from moesaic.nas.search.samplers.independent import RandomSampler
from moesaic.nas.search.samplers.scores import (
    Part,
    Place,
    Scores,
    part_of,
    places_of,
    shape_of,
    shaped,
    with_part,
)
from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import Architecture, Slot

_CORRECTIONS = 30
"""Attempts before giving up, where solutions turn out over budget because a cost is not a sum over parts."""
_LEVELS = 16
"""After this many cost levels in a row without a new solution, the library counts as exhausted."""
_CUTS = 20
"""Known solutions that a programme rules out: the best ones under its caps. A level with more of them is left, so that
the time of a proposal does not grow with the log."""
_PRIMES = (2, 3, 5, 7, 11)
_PLANNED = ("parent", "part", "base")
"""Roles of trials for scores."""


class Program:
    """The integer programme of ``scores`` under a budget.

    There is one binary variable per shape, exactly one of which is chosen, and one per width, place and part. A place
    has one part at the chosen width if its layer is inside the chosen depth, and none otherwise. Costs, which depend on
    width and part together, are sums over these variables.
    """

    def __init__(self, scores: Scores, budget: Budget, objectives: Iterable[str] = ()):
        self.scores, self.budget, self.objectives = scores, budget, tuple(objectives)
        self.shapes = sorted(scores.bases)
        self.stacks = {name: number for number, name in enumerate(scores.parent.stacks)}
        deepest: dict[tuple[str, int], int] = {}
        for name, number in self.stacks.items():
            for width, depth in (shape[number] for shape in self.shapes):
                deepest[name, width] = max(depth, deepest.get((name, width), 0))
        self.choices = [
            (width, place, part)
            for (name, width), depth in deepest.items()
            for place, parts in scores.deltas.items()
            if place[0].stack == name and place[0].index < depth
            for part in parts
        ]
        self.index = {key: i for i, key in enumerate([*self.shapes, *self.choices])}
        self.losses = np.array(
            [*(scores.bases[shape] for shape in self.shapes), *(scores.deltas[p][part] for _, p, part in self.choices)]
        )
        self.limits = np.array([line.limit for line in budget.lines])
        self.bounds = self._coefficients(lambda a: list(budget.bound(a).values()))
        self.costs = self._coefficients(lambda a: [budget.pricer.expected(a)[name] for name in self.objectives])
        self.structure = self._structure()
        self._remembered: set[str] = set()
        self._known: list[tuple[float, tuple[float, ...], str, Architecture]] = []

    def remember(self, known: Iterable[tuple[str, Architecture]]) -> None:
        """Known architectures, by fingerprint, for ``best_known``."""
        for fingerprint, architecture in known:
            if fingerprint not in self._remembered:
                self._remembered.add(fingerprint)
                if (row := self._row(architecture)) is not None:
                    costs = tuple((self.costs @ row).tolist())
                    insort(self._known, (float(self.losses @ row), costs, fingerprint, architecture))

    def best_known(self, caps: Mapping[str, float], count: int) -> list[Architecture]:
        """The ``count`` known architectures under ``caps`` with the lowest predicted losses."""
        limits = [caps.get(name, math.inf) for name in self.objectives]
        inside = (architecture for _, costs, _, architecture in self._known if all(map(le, costs, limits)))
        return list(islice(inside, count))

    def solve(
        self, caps: Mapping[str, float] | None = None, excluded: Iterable[Architecture] = (), least: str | None = None
    ) -> Architecture | None:
        """The architecture with the lowest predicted loss (or lowest cost ``least``) inside the budget and under
        ``caps`` on expected objectives, except those in ``excluded``; None where there is none.

        A cost that is not a sum over parts (memory has a peak; that of cross-attention depends on the encoder's width,
        and the parent's is taken) is corrected: a solution that the pricer finds over
        budget is excluded, and the line is tightened by its excess.
        """
        caps = caps or {}
        goal = self.losses if least is None else self.costs[self.objectives.index(least)]
        capped = [self.objectives.index(name) for name in caps]
        cuts = [row for architecture in excluded if (row := self._row(architecture)) is not None]
        limits = self.limits.copy()
        for _ in range(_CORRECTIONS):
            upper = np.concatenate([limits, list(caps.values()), [row.sum() - 1 for row in cuts]])
            rows = np.vstack([self.bounds, self.costs[capped], *cuts])
            scale = np.where(upper > 0, upper, 1.0)
            found = milp(
                goal / max(np.abs(goal).max(), 1e-12),
                integrality=np.ones(len(goal)),
                bounds=Bounds(0, 1),
                constraints=[self.structure, (rows / scale[:, None], -np.inf, upper / scale)],
                options={"mip_rel_gap": 0},
            )
            if found.x is None:
                return None
            architecture = self._architecture(found.x)
            excess = np.array(list(self.budget.bound(architecture).values())) - self.limits
            if excess.max() <= 0:
                return architecture
            limits -= np.maximum(excess, 0)
            cuts.append(np.round(found.x))
        return None

    @cached_property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """For each objective, the least expected cost and that of the best solution, above which no cap binds."""
        best = self.solve()
        return {
            name: (self.budget.pricer.expected(least)[name], self.budget.pricer.expected(best)[name])
            for name in self.objectives
            if best is not None and (least := self.solve(least=name)) is not None
        }

    def _coefficients(self, price: Callable[[Architecture], Sequence[float]]) -> np.ndarray:
        """[costs, variables]: the cost each variable adds; the parent's own parts add nothing beyond their shape."""
        parent = self.scores.parent
        columns = [np.array(price(shaped(parent, shape)), float) for shape in self.shapes]
        for width, place, part in self.choices:
            name = place[0].stack
            host = replace(parent, **{name: replace(parent.stacks[name], width=width)})
            columns.append(np.array(price(with_part(host, place, part)), float) - np.array(price(host), float))
        return np.array(columns).T

    def _structure(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Constraints: one shape, and one part in each of its places."""
        rows = [np.array([float(i < len(self.shapes)) for i in range(len(self.losses))])]
        for width, place in dict.fromkeys((width, place) for width, place, _ in self.choices):
            row = np.zeros(len(self.losses))
            for i, key in enumerate(self.choices, start=len(self.shapes)):
                row[i] = key[:2] == (width, place)
            number, position = self.stacks[place[0].stack], place[0].index
            for i, shape in enumerate(self.shapes):
                row[i] = -float(shape[number][0] == width and shape[number][1] > position)
            rows.append(row)
        value = np.array([1.0] + [0.0] * (len(rows) - 1))
        return np.array(rows), value, value

    def _row(self, architecture: Architecture) -> np.ndarray | None:
        """[variables] the choices of ``architecture``; None where it cannot be chosen."""
        places = places_of(architecture.layers)
        parts = [(architecture.width_at(place[0]), place, part_of(architecture, place)) for place in places]
        keys = [shape_of(architecture), *parts]
        if any(key not in self.index for key in keys):
            return None
        row = np.zeros(len(self.losses))
        row[[self.index[key] for key in keys]] = 1
        return row

    def _architecture(self, x: np.ndarray) -> Architecture:
        host = shaped(self.scores.parent, self.shapes[int(x[: len(self.shapes)].argmax())])
        layers: dict[Slot, dict[str, Any]] = {}
        for (_, (slot, kind), part), value in zip(self.choices, x[len(self.shapes) :], strict=True):
            if value > 0.5:
                layers.setdefault(slot, {})[kind] = part
        return host.with_layers({slot: replace(host.layers[slot], **parts) for slot, parts in layers.items()})


@dataclass
class PuzzleSampler:
    """First proposes the trials for scores: the parent, each part in it, the parent in other shapes. Then proposes
    optima under the budget and a cap on every cost that is an objective, each time the best one not known yet. The
    levels of the caps halve the gaps between earlier ones (Halton), so that they spread over the front."""

    feasible: FeasibleSampler
    seed: int
    objectives: tuple[str, ...]
    parts: int
    """Most feed-forward parts scored per layer, spread evenly over numbers of experts."""
    known: Scores | None = None
    """Scores from before the search: then there are no trials for scores."""
    _plans: dict[Architecture, dict[Architecture, str]] = field(default_factory=dict, init=False, repr=False)
    _programme: Program | None = field(default=None, init=False, repr=False)
    _read: int = field(default=0, init=False, repr=False)
    """Number of trials of the log that were read."""
    _scored: list[Trial] = field(default_factory=list, init=False, repr=False)
    """Those of them that scores are made from."""
    _scores: Scores | None = field(default=None, init=False, repr=False)

    def propose(self, state: SearchState) -> Proposal | None:
        scores = self.known or self._scores_of(state.trials)
        plan = {} if self.known else self.plan(scores.parent if scores else self._parent)
        for architecture, role in plan.items():
            if state.unknown(architecture):
                return Proposal(architecture, engine={"puzzle": {"role": role}})
        # Levels of this budget alone: with those of several in turn, one would get the odd ones, which are all tight.
        levels = sum(engine.get("puzzle", {}).get("role") not in _PLANNED for engine in state.own)
        found = scores and self._solution(scores, state, levels)
        if scores is None or found is None:
            return RandomSampler(self.feasible, self.seed).propose(state)
        return Proposal(found, engine={"puzzle": {"role": "solution", "predicted": scores.predict(found)}})

    def _scores_of(self, trials: Sequence[Trial]) -> Scores | None:
        """``Scores.of(trials)``, made again only where a new trial matters to it."""
        new = [trial for trial in trials[self._read :] if self._scores is None or self._scores.uses(trial)]
        self._read = len(trials)
        if new:
            self._scored += new
            self._scores = Scores.of(self._scored)
        return self._scores

    def plan(self, parent: Architecture) -> dict[Architecture, str]:
        """The architectures to evaluate for the scores of ``parent``, with their roles; all inside the budget."""
        if parent not in self._plans:
            space, fits = self.feasible.space, self.feasible.budget.fits
            plan = {parent: "parent"} if fits(parent) else {}
            plan |= dict.fromkeys(self._replacements(parent), "part")
            shapes = (
                product(stack.widths, (depth for depth in stack.depths if depth <= len(parent.stacks[name].layers)))
                for name, stack in space.stacks.items()
            )
            for shape in product(*shapes):
                host = shaped(parent, shape)
                hosts = (host, host.with_layers({slot: space.layers[slot].smallest for slot in host.layers}))
                if host := next((host for host in hosts if fits(host)), None):
                    plan.setdefault(host, "base")
            self._plans[parent] = plan
        return self._plans[parent]

    @cached_property
    def _parent(self) -> Architecture:
        pricer = self.feasible.budget.pricer
        return max(self._hosts(), key=lambda host: (len(self._replacements(host)), pricer.expected(host)["flops"]))

    def _hosts(self) -> list[Architecture]:
        """Candidates for the parent: uniform networks inside the budget, dense ones if there are any."""
        space, fits = self.feasible.space, self.feasible.budget.fits
        for sparse in (False, True):
            if hosts := [a for a in uniform_layouts(space, sparse) if a in space and fits(a)]:
                return hosts
        return [self.feasible.inside]

    def _replacements(self, host: Architecture) -> list[Architecture]:
        replaced = [
            with_part(host, place, part)
            for place in places_of(host.layers)
            for part in self._library[place]
            if part != part_of(host, place)
        ]
        return [architecture for architecture in replaced if self.feasible.budget.fits(architecture)]

    @cached_property
    def _library(self) -> dict[Place, list[Part]]:
        """All parts of a place; of many feed-forward ones, the smallest and random ones per number of experts."""
        library: dict[Place, list[Part]] = {}
        for slot, layer in self.feasible.space.layers.items():
            library[slot, "attention"] = list(layer.attentions)
            library[slot, "cross"] = [cross for cross in layer.crosses if cross]
            if sum(group.count for group in layer.groups) <= self.parts:
                library[slot, "feed_forward"] = [part for group in layer.groups for part in group]
                continue
            rng, few = Random(f"{self.seed}/puzzle/{slot}"), dict[Part, None]()
            few[layer.smallest.feed_forward] = None
            for turn in range(UNSEEN_TRIES):
                if len(few) < self.parts:
                    few[layer.groups[turn % len(layer.groups)].sample(rng)] = None
            library[slot, "feed_forward"] = list(few)
        return library

    def _solution(self, scores: Scores, state: SearchState, number: int) -> Architecture | None:
        if self._programme is None or self._programme.scores != scores:
            self._programme = Program(scores, self.feasible.budget, self.objectives)
        program, ranges = self._programme, self._programme.ranges
        program.remember((fingerprint, trial.architecture) for fingerprint, trial in state.seen.items())
        program.remember((architecture.fingerprint, architecture) for architecture in state.running)
        for level in range(number, number + _LEVELS):
            caps = {
                name: high - radical_inverse(level, prime) * (high - low)
                for (name, (low, high)), prime in zip(ranges.items(), _PRIMES, strict=False)
            }
            found = program.solve(caps, program.best_known(caps, _CUTS))
            if found is not None and state.unknown(found):
                return found
        return None


def radical_inverse(index: int, base: int) -> float:
    """Digits of ``index`` mirrored at the point: 0, 1/2, 1/4, 3/4 ... for base 2 (van der Corput)."""
    value, digit = 0.0, 1.0
    while index:
        index, last = divmod(index, base)
        digit /= base
        value += last * digit
    return value
