"""Exact draws from the tail of a sum: members of a space inside a budget that almost none of them meets.

The law wanted is that of ``SearchSpace.sample_balanced``, p, given that the budget is met. Members are proposed by

    q(a) = p(a) exp(-t . c(a)) / M(t),    t >= 0,

where c(a) are costs that add up over layers and are at most ``limits`` for every member inside the budget. A proposal
that is inside is kept with probability exp(t . (c(a) - limits)), which makes what is kept proportional to p(a), for any
t. The share kept is P(inside) / (M(t) exp(t . limits)). The denominator bounds P(inside) from above (Chernoff); t
minimises it, so the share falls with the tail only polynomially (Asmussen and Glynn 2007, Stochastic Simulation, VI).

At given widths, q draws layers independently, and the sizes of a layer's experts as a Markov chain, the largest first.
So M and q are exact, by dynamic programming.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, product
from random import Random

import numpy as np
from scipy.optimize import minimize

from moesaic.nas.costs.additive import AdditiveCosts, Choice, LayerCosts
from moesaic.search_spaces import Architecture, FeedForward, Layer, Slot, Stack

Shape = tuple[tuple[int, int], ...]
"""Width and depth of each stack."""
_SCALE_DRAWS = 64
"""Random members whose costs set the unit of each tilt."""
_STEEPEST = 1e4
"""Largest tilt, per standard deviation of a cost."""


def chains(slopes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """[experts, rows, sizes] sums of weights, exp(-sum over experts of slope x size), of multisets of rising ``sizes``.

    Entry [e, row, i] sums over all sizes of the experts after e, where expert e has size i and they have no larger one.
    ``slopes`` are [experts, rows]; weights are relative to those of the smallest size.
    """
    above = np.array(sizes) - sizes[0]
    sums = np.exp(-slopes[:, :, None] * above)
    for e in range(len(sums) - 2, -1, -1):
        sums[e] *= sums[e + 1].cumsum(-1)
    return sums


@dataclass(frozen=True)
class _Law:
    """One layer under a tilt: log of p times exp(-tilt . cost), for its attentions, for its cross-attentions, and for
    its feed-forward parts summed over expert sizes."""

    attentions: np.ndarray
    crosses: np.ndarray
    parts: np.ndarray

    @cached_property
    def log_sum(self) -> float:
        return _log_sum(self.attentions) + _log_sum(self.crosses) + _log_sum(self.parts)


class TiltedLaw:
    """q for one space and ``limits`` [terms] of its additive costs."""

    def __init__(self, costs: AdditiveCosts, limits: Sequence[float]):
        self.costs, self.limits, space = costs, np.array(limits), costs.space
        self._shapes: list[Shape] = list(product(*(product(one.widths, one.depths) for one in space.stacks.values())))
        self._bases = {widths: costs.base(widths) for widths in dict.fromkeys(map(_widths, self._shapes))}
        places = [(slot, widths) for slot in space.layers for widths in self._bases]
        layers = [costs.layer(*place) for place in places]
        self._layers = list({id(layer): layer for layer in layers}.values())  # equal ones are one object
        numbers = {id(layer): number for number, layer in enumerate(self._layers)}
        self._number = {place: numbers[id(layer)] for place, layer in zip(places, layers, strict=True)}
        self._families: dict[tuple[int, tuple[int, ...]], list[tuple[int, int]]] = defaultdict(list)
        for number, layer in enumerate(self._layers):
            for at, choice in enumerate(layer.choices):
                self._families[choice.group.chosen, choice.group.sizes].append((number, at))
        self.tilt = self._best_tilt()
        laws = self._laws(self.tilt)
        self._shape_weights = _cumulative(self._log_shapes(self.tilt, laws))
        self._weights = [tuple(map(_cumulative, (law.attentions, law.crosses, law.parts))) for law in laws]
        self._parts = [_parts(layer) for layer in self._layers]
        self._chain = lru_cache(maxsize=4096)(self._chain_of)

    def propose(self, rng: Random) -> tuple[Architecture, float]:
        """A member drawn from q, and the probability with which to keep it if it is inside the budget."""
        space = self.costs.space
        (shape,) = rng.choices(self._shapes, cum_weights=self._shape_weights)
        widths = _widths(shape)
        total = self._bases[widths].copy()
        stacks: dict[str, Stack] = {}
        for (name, stack), (width, depth) in zip(space.stacks.items(), shape, strict=True):
            layers = []
            for index in range(depth):
                layer, cost = self._layer(Slot(name, index), widths, rng)
                layers.append(layer)
                total += cost
            stacks[name] = stack.build(width, tuple(layers))
        return space.build(stacks), math.exp(min(0.0, float(self.tilt @ (total - self.limits))))

    def _layer(self, slot: Slot, widths: tuple[int, ...], rng: Random) -> tuple[Layer, np.ndarray]:
        """A layer and its costs."""
        number, space = self._number[slot, widths], self.costs.space.layers[slot]
        costs, (attentions, crosses, parts) = self._layers[number], self._weights[number]
        (attention,) = rng.choices(range(len(attentions)), cum_weights=attentions)
        (cross,) = rng.choices(range(len(crosses)), cum_weights=crosses) if len(crosses) > 1 else (0,)
        ((at, shared),) = rng.choices(self._parts[number], cum_weights=parts)
        choice, sizes, last = costs.choices[at], [], -1
        for sums in self._chain(number, at):
            last = bisect_right(sums, rng.random() * sums[last], 0, last % len(sums))
            sizes.append(choice.group.sizes[last])
            if last == 0:  # the others are as small
                sizes += [choice.group.sizes[0]] * (choice.group.chosen - len(sizes))
                break
        sizes = choice.group.expert_sizes(tuple(sizes))
        part = FeedForward(sizes, choice.router, choice.group.shared_sizes[shared])
        cost = costs.attentions[attention] + costs.crosses[cross] + choice.constants[shared]
        cost += np.array(sizes) @ choice.slopes
        return Layer(space.attentions[attention], part, space.crosses[cross]), cost

    def _chain_of(self, number: int, at: int) -> list[list[float]]:
        """[experts][sizes] the sums of ``chains`` for one choice, accumulated over sizes."""
        choice = self._layers[number].choices[at]
        return chains(_slopes(choice, self.tilt)[:, None], choice.group.sizes)[:, 0].cumsum(-1).tolist()

    def _best_tilt(self) -> np.ndarray:
        """[terms] the t that minimises log(M(t) exp(t . limits)), a convex function."""
        rng = Random("tilt")
        drawn = np.array([self.costs.of(self.costs.space.sample_balanced(rng)) for _ in range(_SCALE_DRAWS)])
        deviation = drawn.std(0)
        unit = np.where(deviation > 1e-9 * self.limits, 1 / np.maximum(deviation, 1e-300), 0.0)

        def bound(scaled: np.ndarray) -> float:
            tilt = scaled * unit
            return _log_sum(self._log_shapes(tilt, self._laws(tilt))) + float(tilt @ self.limits)

        found = minimize(bound, np.ones(len(unit)), method="L-BFGS-B", bounds=[(0, _STEEPEST)] * len(unit))
        return found.x * unit

    def _log_shapes(self, tilt: np.ndarray, laws: Sequence[_Law]) -> np.ndarray:
        """[shapes] log of p times exp(-tilt . cost), summed over the members of each shape."""
        sums = {}
        for name, stack in self.costs.space.stacks.items():
            for widths in self._bases:
                own = (laws[self._number[Slot(name, index), widths]].log_sum for index in range(len(stack.layers)))
                sums[name, widths] = list(accumulate(own, initial=0.0))
        logs = [
            sum(
                sums[name, _widths(shape)][depth]
                for name, (_, depth) in zip(self.costs.space.stacks, shape, strict=True)
            )
            - tilt @ self._bases[_widths(shape)]
            for shape in self._shapes
        ]
        return np.array(logs) - math.log(len(logs))

    def _laws(self, tilt: np.ndarray) -> list[_Law]:
        """One per distinct layer; chains of equal sizes and length are summed together."""
        logs = {}
        for (chosen, sizes), rows in self._families.items():
            slopes = np.stack([_slopes(self._layers[number].choices[at], tilt) for number, at in rows], 1)
            sums = chains(slopes, sizes)[0].sum(-1) if chosen else np.ones(len(rows))
            totals = np.log(sums) - slopes.sum(0) * sizes[0]
            multisets = math.log(math.comb(len(sizes) + chosen - 1, chosen))
            logs |= zip(rows, totals - multisets, strict=True)
        laws = []
        for number, costs in enumerate(self._layers):
            groups = len({choice.group.experts for choice in costs.choices})
            parts = []
            for at, choice in enumerate(costs.choices):
                alike = groups * len(choice.group.routers) * len(choice.constants)
                parts.append(logs[number, at] - math.log(alike) - choice.constants @ tilt)
            attentions, crosses = (-rows @ tilt - math.log(len(rows)) for rows in (costs.attentions, costs.crosses))
            laws.append(_Law(attentions, crosses, np.concatenate(parts)))
        return laws


def _widths(shape: Shape) -> tuple[int, ...]:
    return tuple(width for width, _ in shape)


def _slopes(choice: Choice, tilt: np.ndarray) -> np.ndarray:
    """[chosen sizes] what the tilt takes off per neuron of each: one size that all experts have counts in all."""
    slopes = choice.slopes @ tilt
    return slopes.sum(keepdims=True) if choice.group.equal else slopes


def _parts(costs: LayerCosts) -> list[tuple[int, int]]:
    """(choice, shared size) in the order of ``_Law.parts``."""
    return [(at, shared) for at, choice in enumerate(costs.choices) for shared in range(len(choice.constants))]


def _log_sum(logs: np.ndarray) -> float:
    """log of the sum of exp(``logs``)."""
    most = logs.max()
    return float(most + np.log(np.exp(logs - most).sum()))


def _cumulative(logs: np.ndarray) -> list[float]:
    return np.exp(logs - logs.max()).cumsum().tolist()
