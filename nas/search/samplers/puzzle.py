"""Puzzle (arXiv 2411.19146): score each part of a layer once, then choose the best combination by integer programming.

A part is a layer's attention or its feed-forward. Its score is what the loss gains or loses when it alone replaces its
like in a parent. A model's loss is then taken to be that of the parent at its width and depth plus the scores of its
parts, its costs to be such sums too, and ``scipy.optimize.milp`` finds the optimum under any limits: a new budget
needs no new evaluation. Scores are trials like others, read off the log; ``additivity`` says how far the sums were
from what was evaluated afterwards.

Puzzle's parent is a model far over the budget; here nothing over it is evaluated. The parent is the uniform network in
which the most single parts can be replaced inside the budget, and whose scores also add up best (docs/search.md). A
part that does not fit there is not chosen.
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
from moesaic.nas.search.proposal import UNSEEN_TRIES, Progress, Proposal
from moesaic.nas.search.rivals import uniform_layouts
from moesaic.nas.search.samplers.independent import RandomSampler
from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import Architecture, Attention, FeedForward, Layer, Stack

Kind = Literal["attention", "feed_forward"]
Part = Attention | FeedForward
Slot = tuple[int, Kind]
"""Position of a layer, and which of its parts."""
_KINDS: tuple[Kind, ...] = ("attention", "feed_forward")
_CORRECTIONS = 30
"""Solutions that may turn out over budget, where a cost is no sum over parts, before there is none."""
_LEVELS = 16
"""Levels of cost in a row that may have nothing new before the library counts as exhausted."""
_PRIMES = (2, 3, 5, 7, 11)


def slots_of(depth: int) -> list[Slot]:
    return list(product(range(depth), _KINDS))


def part_of(architecture: Architecture, slot: Slot) -> Part:
    return getattr(architecture.decoder.layers[slot[0]], slot[1])


def with_part(architecture: Architecture, slot: Slot, part: Part) -> Architecture:
    """``architecture`` with one part replaced."""
    position, kind = slot
    layers = list(architecture.decoder.layers)
    layers[position] = replace(layers[position], **{kind: part})
    return replace(architecture, decoder=replace(architecture.decoder, layers=tuple(layers)))


def role_of(trial: Trial) -> str | None:
    """What a trial was evaluated for: ``parent``, ``part``, ``base`` (another width and depth), ``solution``."""
    return trial.engine.get("puzzle", {}).get("role")


@dataclass(frozen=True)
class Scores:
    """``bases``: the loss of the parent at each width and depth. ``deltas``: per slot, what each part adds to it; the
    parent's own adds nothing."""

    parent: Architecture
    bases: Mapping[tuple[int, int], float]
    deltas: Mapping[Slot, Mapping[Part, float]]

    @staticmethod
    def of(trials: Iterable[Trial]) -> Scores | None:
        """From a log, whichever budget its trials were proposed for; None where no parent was evaluated. What failed
        has no score."""
        judged = [(trial, trial.loss) for trial in trials if trial.state == "evaluated" and trial.loss is not None]
        found = next(((trial, loss) for trial, loss in judged if role_of(trial) == "parent"), None)
        if found is None:
            return None
        parent, loss = found[0].architecture, found[1]
        slots = slots_of(len(parent.decoder.layers))
        deltas: dict[Slot, dict[Part, float]] = {slot: {part_of(parent, slot): 0.0} for slot in slots}
        for trial, changed in judged:
            if _shape(trial.architecture) == _shape(parent):
                differing = [slot for slot in slots if part_of(trial.architecture, slot) != part_of(parent, slot)]
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
        for slot in slots_of(len(architecture.decoder.layers)):
            delta = self.deltas.get(slot, {}).get(part_of(architecture, slot))
            if delta is None:
                return None
            total += delta
        return total

    def predict(self, architecture: Architecture) -> float | None:
        """The loss as a sum; None where a part, or the pair of width and depth, has no score."""
        base, parts = self.bases.get(_shape(architecture)), self.parts(architecture)
        return None if base is None or parts is None else base + parts


def _shape(architecture: Architecture) -> tuple[int, int]:
    """Width and depth."""
    return architecture.decoder.width, len(architecture.decoder.layers)


class Program:
    """The integer programme of ``scores`` under a budget.

    One binary variable per pair of width and depth, of which one is chosen, and one per width, slot and part. A slot
    has one part at the chosen width if its layer is inside the chosen depth, and none otherwise. Costs, which are
    products of width and part, are sums over these variables.
    """

    def __init__(self, scores: Scores, budget: Budget, objectives: Iterable[str] = ()):
        self.scores, self.budget, self.objectives = scores, budget, tuple(objectives)
        self.shapes = sorted(scores.bases)
        deepest = {width: max(d for w, d in self.shapes if w == width) for width, _ in self.shapes}
        self.choices = [
            (width, slot, part)
            for width, depth in deepest.items()
            for slot in slots_of(depth)
            for part in scores.deltas[slot]
        ]
        self.place = {key: i for i, key in enumerate([*self.shapes, *self.choices])}
        self.losses = np.array(
            [*(scores.bases[shape] for shape in self.shapes), *(scores.deltas[s][part] for _, s, part in self.choices)]
        )
        self.limits = np.array([line.limit for line in budget.lines])
        self.bounds = self._coefficients(lambda a: list(budget.bound(a).values()))
        self.costs = self._coefficients(lambda a: [budget.pricer.expected(a)[name] for name in self.objectives])
        self.structure = self._structure()

    def solve(
        self, caps: Mapping[str, float] | None = None, excluded: Iterable[Architecture] = (), least: str | None = None
    ) -> Architecture | None:
        """The architecture of least predicted loss (or of the ``least`` cost) inside the budget and under ``caps`` on
        expected objectives, none of ``excluded``; None where there is none.

        A cost that is no sum over parts (memory has a peak) is corrected: a solution that the pricer finds over budget
        is excluded, and the line tightened by its excess.
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
        """Of each objective, its least expected cost and that of the best solution, above which no cap binds."""
        best = self.solve()
        return {
            name: (self.budget.pricer.expected(least)[name], self.budget.pricer.expected(best)[name])
            for name in self.objectives
            if best is not None and (least := self.solve(least=name)) is not None
        }

    def _coefficients(self, price: Callable[[Architecture], Sequence[float]]) -> np.ndarray:
        """[costs, variables]: what each adds, the parent's own parts nothing beyond their width and depth."""
        stack = self.scores.parent.decoder

        def host(width: int, depth: int) -> Architecture:
            return replace(self.scores.parent, decoder=replace(stack, width=width, layers=stack.layers[:depth]))

        columns = [np.array(price(host(*shape)), float) for shape in self.shapes]
        for width, slot, part in self.choices:
            whole = host(width, len(stack.layers))
            columns.append(np.array(price(with_part(whole, slot, part)), float) - np.array(price(whole), float))
        return np.array(columns).T

    def _structure(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One shape, and one part in each slot that it has."""
        rows = [np.array([float(i < len(self.shapes)) for i in range(len(self.losses))])]
        for width, slot in dict.fromkeys((width, slot) for width, slot, _ in self.choices):
            row = np.zeros(len(self.losses))
            for i, key in enumerate(self.choices, start=len(self.shapes)):
                row[i] = key[:2] == (width, slot)
            for i, (w, depth) in enumerate(self.shapes):
                row[i] = -float(w == width and depth > slot[0])
            rows.append(row)
        value = np.array([1.0] + [0.0] * (len(rows) - 1))
        return np.array(rows), value, value

    def _row(self, architecture: Architecture) -> np.ndarray | None:
        """[variables] the choices of ``architecture``; None where it cannot be chosen."""
        width, depth = _shape(architecture)
        keys = [(width, depth), *((width, slot, part_of(architecture, slot)) for slot in slots_of(depth))]
        if any(key not in self.place for key in keys):
            return None
        row = np.zeros(len(self.losses))
        row[[self.place[key] for key in keys]] = 1
        return row

    def _architecture(self, x: np.ndarray) -> Architecture:
        width, depth = self.shapes[int(x[: len(self.shapes)].argmax())]
        chosen: dict[Slot, Any] = {
            slot: part
            for (w, slot, part), value in zip(self.choices, x[len(self.shapes) :], strict=True)
            if w == width and value > 0.5
        }
        layers = [Layer(**{kind: chosen[i, kind] for kind in _KINDS}) for i in range(depth)]
        parent = self.scores.parent
        return replace(parent, decoder=Stack(width, tuple(layers)))


@dataclass
class PuzzleSampler:
    """First the scores: the parent, each part in it, the parent at other widths and depths. Then the optima under the
    budget and a cap on every cost that is an objective, at levels that halve the gaps between earlier ones (Halton), so
    that they spread over the front; each time the best that is not known yet."""

    feasible: FeasibleSampler
    seed: int
    objectives: tuple[str, ...]
    parts: int
    """Feed-forward parts scored per layer, fairly over numbers of experts, where a layer has more."""
    _plans: dict[Architecture, dict[Architecture, str]] = field(default_factory=dict, init=False, repr=False)
    _programme: Program | None = field(default=None, init=False, repr=False)

    def propose(self, progress: Progress) -> Proposal | None:
        scores = Scores.of(progress.trials)
        plan = self.plan(scores.parent if scores else self._parent)
        for architecture, role in plan.items():
            if progress.unknown(architecture):
                return Proposal(architecture, engine={"puzzle": {"role": role}})
        found = scores and self._solution(scores, progress, max(progress.asked - len(plan), 0))
        if scores is None or found is None:
            return RandomSampler(self.feasible, self.seed).propose(progress)
        return Proposal(found, engine={"puzzle": {"role": "solution", "predicted": scores.predict(found)}})

    def observe(self, trial: Trial) -> None:
        pass

    def plan(self, parent: Architecture) -> dict[Architecture, str]:
        """What is evaluated for the scores of ``parent``, with its role; all inside the budget."""
        if parent not in self._plans:
            space, fits, layers = self.feasible.space, self.feasible.budget.fits, parent.decoder.layers
            plan = {parent: "parent"} if fits(parent) else {}
            plan |= dict.fromkeys(self._replacements(parent), "part")
            for width, depth in product(space.widths, [depth for depth in space.depths if depth <= len(layers)]):
                smallest = tuple(space.smallest_layer(i) for i in range(depth))
                hosts = (space.build(width, layers[:depth]), space.build(width, smallest))
                if host := next((host for host in hosts if fits(host)), None):
                    plan.setdefault(host, "base")
            self._plans[parent] = plan
        return self._plans[parent]

    @cached_property
    def _parent(self) -> Architecture:
        pricer = self.feasible.budget.pricer
        return max(self._hosts(), key=lambda host: (len(self._replacements(host)), pricer.expected(host)["flops"]))

    def _hosts(self) -> list[Architecture]:
        """Candidates for the parent: uniform networks inside the budget, dense ones where there are any."""
        space, fits = self.feasible.space, self.feasible.budget.fits
        for sparse in (False, True):
            if hosts := [a for a in uniform_layouts(space, sparse) if a in space and fits(a)]:
                return hosts
        return [self.feasible.inside]

    def _replacements(self, host: Architecture) -> list[Architecture]:
        replaced = [
            with_part(host, slot, part)
            for slot in slots_of(len(host.decoder.layers))
            for part in self._library[slot]
            if part != part_of(host, slot)
        ]
        return [architecture for architecture in replaced if self.feasible.budget.fits(architecture)]

    @cached_property
    def _library(self) -> dict[Slot, list[Part]]:
        """All parts of a slot; of many feed-forward ones the smallest and random ones of each number of experts."""
        library: dict[Slot, list[Part]] = {}
        for position, layer in enumerate(self.feasible.space.layers):
            library[position, "attention"] = list(layer.attentions)
            if sum(group.count for group in layer.groups) <= self.parts:
                library[position, "feed_forward"] = [part for group in layer.groups for part in group]
                continue
            rng, few = Random(f"{self.seed}/puzzle/{position}"), dict[Part, None]()
            few[self.feasible.space.smallest_layer(position).feed_forward] = None
            for turn in range(UNSEEN_TRIES):
                if len(few) < self.parts:
                    few[layer.groups[turn % len(layer.groups)].sample(rng)] = None
            library[position, "feed_forward"] = list(few)
        return library

    def _solution(self, scores: Scores, progress: Progress, number: int) -> Architecture | None:
        if self._programme is None or self._programme.scores != scores:
            self._programme = Program(scores, self.feasible.budget, self.objectives)
        program, excluded = self._programme, [trial.architecture for trial in progress.seen.values()]
        ranges = program.ranges
        for level in range(number, number + _LEVELS):
            caps = {
                name: high - radical_inverse(level, prime) * (high - low)
                for (name, (low, high)), prime in zip(ranges.items(), _PRIMES, strict=False)
            }
            while (found := program.solve(caps, excluded)) is not None:
                if progress.unknown(found):
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
    """How far predicted losses of solutions were from the evaluated ones: number, mean absolute error and mean error in
    nats, Kendall's tau (None where it is not defined); None for a log with fewer than two solutions."""
    pairs = [
        (trial.engine["puzzle"]["predicted"], trial.loss)
        for trial in trials
        if trial.state == "evaluated" and role_of(trial) == "solution"
    ]
    if len(pairs) < 2:
        return None
    predicted, loss = np.array(pairs).T
    error, tau = predicted - loss, float(kendalltau(predicted, loss).statistic)
    return {
        "solutions": len(pairs),
        "mean_absolute_error": float(np.abs(error).mean()),
        "mean_error": float(error.mean()),
        "tau": None if math.isnan(tau) else tau,
    }
