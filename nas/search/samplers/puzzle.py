"""Puzzle (arXiv 2411.19146): score each part of a layer once, then find the best combination by integer programming.

A part is a layer's attention or its feed-forward. Its score is the change in loss when it alone replaces its
counterpart in a parent. A model's loss is modelled as that of the parent at its width and depth plus the scores of
its parts, and its costs as such sums too. ``scipy.optimize.milp`` then finds the optimum under any limits, so a new
budget needs no new evaluation. Scores are ordinary trials in the log; ``additivity`` says how far the sums were from
the losses evaluated afterwards.

Puzzle's parent is a model far over the budget; here nothing over budget is evaluated. The parent is the uniform
network in which most single parts can be replaced inside the budget; its scores also add up best (docs/search.md).
A part that does not fit there is not chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from random import Random
from typing import Any, Literal

import numpy as np
from scipy.optimize import Bounds, milp
from scipy.stats import kendalltau

from moesaic.nas.search.budget import Budget
from moesaic.nas.search.feasible import FeasibleSampler
from moesaic.nas.search.proposal import UNSEEN_TRIES, Proposal, SearchState
from moesaic.nas.search.rivals import uniform_layouts
from moesaic.nas.search.samplers.independent import RandomSampler
from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import Architecture, Attention, FeedForward, Layer, Slot

Kind = Literal["attention", "feed_forward"]
Part = Attention | FeedForward
Place = tuple[Slot, Kind]
"""A layer's address and one of its parts."""
Shape = tuple[tuple[int, int], ...]
"""Width and depth of each stack."""
_KINDS: tuple[Kind, ...] = ("attention", "feed_forward")
_CORRECTIONS = 30
"""Attempts before giving up, where solutions turn out over budget because a cost is not a sum over parts."""
_LEVELS = 16
"""After this many cost levels in a row without a new solution, the library counts as exhausted."""
_PRIMES = (2, 3, 5, 7, 11)


def places_of(slots: Iterable[Slot]) -> list[Place]:
    return list(product(slots, _KINDS))


def part_of(architecture: Architecture, place: Place) -> Part:
    return getattr(architecture.layers[place[0]], place[1])


def with_part(architecture: Architecture, place: Place, part: Part) -> Architecture:
    """``architecture`` with one part replaced."""
    slot, kind = place
    return architecture.with_layers({slot: replace(architecture.layers[slot], **{kind: part})})


def role_of(trial: Trial) -> str | None:
    """The purpose of a trial: ``parent``, ``part``, ``base`` (another width and depth), ``solution``."""
    return trial.engine.get("puzzle", {}).get("role")


@dataclass(frozen=True)
class Scores:
    """``bases``: the parent's loss in each shape. ``deltas``: the loss each part of a place adds (parent's: 0)."""

    parent: Architecture
    bases: Mapping[Shape, float]
    deltas: Mapping[Place, Mapping[Part, float]]

    @staticmethod
    def of(trials: Iterable[Trial]) -> Scores | None:
        """From a log, for trials of any budget; None where no parent was evaluated. Failed parts have no score."""
        judged = [(trial, trial.loss) for trial in trials if trial.state == "evaluated" and trial.loss is not None]
        found = next(((trial, loss) for trial, loss in judged if role_of(trial) == "parent"), None)
        if found is None:
            return None
        parent, loss = found[0].architecture, found[1]
        places = places_of(parent.layers)
        deltas: dict[Place, dict[Part, float]] = {place: {part_of(parent, place): 0.0} for place in places}
        for trial, changed in judged:
            if _shape(trial.architecture) == _shape(parent):
                differing = [place for place in places if part_of(trial.architecture, place) != part_of(parent, place)]
                if len(differing) == 1:
                    deltas[differing[0]][part_of(trial.architecture, differing[0])] = changed - loss
        bases, scores = {_shape(parent): loss}, Scores(parent, {}, deltas)
        for trial, changed in judged:
            if role_of(trial) == "base" and (parts := scores.parts(trial.architecture)) is not None:
                bases.setdefault(_shape(trial.architecture), changed - parts)
        return replace(scores, bases=bases)

    def parts(self, architecture: Architecture) -> float | None:
        """The sum of the scores of all parts; None where one has none."""
        total = 0.0
        for place in places_of(architecture.layers):
            delta = self.deltas.get(place, {}).get(part_of(architecture, place))
            if delta is None:
                return None
            total += delta
        return total

    def predict(self, architecture: Architecture) -> float | None:
        """The loss as a sum; None where a part, or the shape, has no score."""
        base, parts = self.bases.get(_shape(architecture)), self.parts(architecture)
        return None if base is None or parts is None else base + parts


def _shape(architecture: Architecture) -> Shape:
    return tuple((stack.width, len(stack.layers)) for stack in architecture.stacks.values())


def _shaped(architecture: Architecture, shape: Shape) -> Architecture:
    """``architecture`` with other widths and the first layers of each stack."""
    stacks = {
        name: replace(stack, width=width, layers=stack.layers[:depth])
        for (name, stack), (width, depth) in zip(architecture.stacks.items(), shape, strict=True)
    }
    return replace(architecture, **stacks)


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
            for place in places_of(Slot(name, index) for index in range(depth))
            for part in scores.deltas[place]
        ]
        self.index = {key: i for i, key in enumerate([*self.shapes, *self.choices])}
        self.losses = np.array(
            [*(scores.bases[shape] for shape in self.shapes), *(scores.deltas[p][part] for _, p, part in self.choices)]
        )
        self.limits = np.array([line.limit for line in budget.lines])
        self.bounds = self._coefficients(lambda a: list(budget.bound(a).values()))
        self.costs = self._coefficients(lambda a: [budget.pricer.expected(a)[name] for name in self.objectives])
        self.structure = self._structure()

    def solve(
        self, caps: Mapping[str, float] | None = None, excluded: Iterable[Architecture] = (), least: str | None = None
    ) -> Architecture | None:
        """The architecture with the lowest predicted loss (or lowest cost ``least``) inside the budget and under
        ``caps`` on expected objectives, except those in ``excluded``; None where there is none.

        A cost that is not a sum over parts (memory has a peak) is corrected: a solution that the pricer finds over
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
        columns = [np.array(price(_shaped(parent, shape)), float) for shape in self.shapes]
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
        keys = [_shape(architecture), *parts]
        if any(key not in self.index for key in keys):
            return None
        row = np.zeros(len(self.losses))
        row[[self.index[key] for key in keys]] = 1
        return row

    def _architecture(self, x: np.ndarray) -> Architecture:
        host = _shaped(self.scores.parent, self.shapes[int(x[: len(self.shapes)].argmax())])
        chosen: dict[Place, Any] = {
            place: part
            for (_, place, part), value in zip(self.choices, x[len(self.shapes) :], strict=True)
            if value > 0.5
        }
        return host.with_layers({slot: Layer(**{kind: chosen[slot, kind] for kind in _KINDS}) for slot in host.layers})


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
    _plans: dict[Architecture, dict[Architecture, str]] = field(default_factory=dict, init=False, repr=False)
    _programme: Program | None = field(default=None, init=False, repr=False)

    def propose(self, state: SearchState) -> Proposal | None:
        scores = Scores.of(state.trials)
        plan = self.plan(scores.parent if scores else self._parent)
        for architecture, role in plan.items():
            if state.unknown(architecture):
                return Proposal(architecture, engine={"puzzle": {"role": role}})
        found = scores and self._solution(scores, state, max(state.asked - len(plan), 0))
        if scores is None or found is None:
            return RandomSampler(self.feasible, self.seed).propose(state)
        return Proposal(found, engine={"puzzle": {"role": "solution", "predicted": scores.predict(found)}})

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
                host = _shaped(parent, shape)
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
        program, excluded = self._programme, [trial.architecture for trial in state.seen.values()]
        ranges = program.ranges
        for level in range(number, number + _LEVELS):
            caps = {
                name: high - radical_inverse(level, prime) * (high - low)
                for (name, (low, high)), prime in zip(ranges.items(), _PRIMES, strict=False)
            }
            while (found := program.solve(caps, excluded)) is not None:
                if state.unknown(found):
                    return found
                excluded.append(found)  # it runs in another lane
        return None


def radical_inverse(index: int, base: int) -> float:
    """Digits of ``index`` mirrored at the point: 0, 1/2, 1/4, 3/4 ... for base 2 (van der Corput)."""
    value, digit = 0.0, 1.0
    while index:
        index, last = divmod(index, base)
        digit /= base
        value += last * digit
    return value


def additivity(trials: Iterable[Trial]) -> dict[str, float | None] | None:
    """How far predicted losses of solutions were from evaluated ones: their number, mean absolute error and mean
    error in nats, and Kendall's tau (None where undefined); None for a log with fewer than two solutions."""
    pairs = [
        (trial.engine["puzzle"]["predicted"], trial.loss)
        for trial in trials
        if trial.state == "evaluated" and role_of(trial) == "solution"
    ]
    if len(pairs) < 2:
        return None
    predicted, loss = np.array(pairs).T
    error, tau = predicted - loss, float(np.asarray(kendalltau(predicted, loss))[0])
    return {
        "solutions": len(pairs),
        "mean_absolute_error": float(np.abs(error).mean()),
        "mean_error": float(error.mean()),
        "tau": None if math.isnan(tau) else tau,
    }
