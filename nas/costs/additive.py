"""Costs as sums over layers, and each layer's as a linear function of its expert sizes: what exact sampling works on.

At given widths, FLOPs, parameters, active parameters and predicted latency are such sums. Memory is not, since it has a
peak, but it is at least the weights, the cache and the logits, which are. All figures come from the pricer, by
differences of networks with one layer, so that each formula exists once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from moesaic.nas.costs.memory import cache_memory, head_memory, weight_memory
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import LayerUse, size_weights
from moesaic.search_spaces import Architecture, Attention, FeedForward, Layer, Router, SearchSpace, Slot, Stack
from moesaic.search_spaces.parts import TILE
from moesaic.search_spaces.space import FeedForwardGroup, LayerSpace

Term = tuple[str, Literal["expected", "worst"]]
"""A cost and its case."""


@dataclass(frozen=True)
class Choice:
    """Feed-forward parts with one number of experts and one router. They cost ``constants`` [shared sizes, terms] + the
    sum over experts, the largest first, of ``slopes`` [experts, terms] times size."""

    group: FeedForwardGroup
    router: Router | None
    constants: np.ndarray
    slopes: np.ndarray


@dataclass(frozen=True)
class LayerCosts:
    """What the choices of a layer at one width add: ``attentions`` [attentions, terms], and the feed-forward parts."""

    attentions: np.ndarray
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class AdditiveCosts:
    """The terms of every member of a space as ``base(widths) + sum of its layers``. Memory is replaced by its bound."""

    space: SearchSpace
    pricer: Pricer
    terms: tuple[Term, ...]
    _layers: dict[tuple, LayerCosts] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of(self, architecture: Architecture) -> np.ndarray:
        """[terms] of a whole architecture."""
        expected = self.pricer.expected_uses(architecture)
        return self._priced(architecture, expected, self.pricer.worst_uses(architecture))

    def base(self, widths: Sequence[int]) -> np.ndarray:
        """[terms] of a network of these widths without layers."""
        stacks = {
            name: stack.build(width, (stack.layers[0].smallest,))
            for (name, stack), width in zip(self.space.stacks.items(), widths, strict=True)
        }
        whole = self.of(self.space.build(stacks))
        return whole - sum(self._first(name, stack.width) for name, stack in stacks.items())

    def layer(self, slot: Slot, width: int) -> LayerCosts:
        """The choices at ``slot``. Layers with equal choices and loads share one value."""
        space = self.space.layers[slot]
        key = (slot.stack, space, width, self.pricer.occupancy.at(slot))
        if key not in self._layers:
            self._layers[key] = self._layer(slot, space, width)
        return self._layers[key]

    def _layer(self, slot: Slot, space: LayerSpace, width: int) -> LayerCosts:
        part = space.smallest.feed_forward
        uses = self._uses(slot, part)
        smallest = self._alone(slot.stack, width, space.smallest, *uses)
        first = self.space.stacks[slot.stack].layers[0].smallest
        before = self._alone(slot.stack, width, first, *self._uses(Slot(slot.stack, 0), first.feed_forward))
        offset = self._first(slot.stack, width) - before
        attentions = [
            self._alone(slot.stack, width, Layer(attention, part), *uses) - smallest for attention in space.attentions
        ]
        choices = [
            self._choice(slot, width, group, router, space.smallest.attention, offset)
            for group in space.groups
            for router in group.routers
        ]
        return LayerCosts(np.array(attentions), tuple(choices))

    def _choice(
        self,
        slot: Slot,
        width: int,
        group: FeedForwardGroup,
        router: Router | None,
        attention: Attention,
        offset: np.ndarray,
    ) -> Choice:
        """``offset`` brings a price of a network with one layer to what that layer adds."""
        size, experts = group.sizes[0], group.experts
        parts = [FeedForward((size,) * experts, router, shared) for shared in group.shared_sizes]
        expected, worst = self._uses(slot, parts[0])

        def price(part: FeedForward, **more: float) -> np.ndarray:
            uses = (
                replace(use, **{name: getattr(use, name) + n for name, n in more.items()}) for use in (expected, worst)
            )
            return self._alone(slot.stack, width, Layer(attention, part), next(uses), next(uses))

        here = np.array([price(part) for part in parts])
        longer = FeedForward((size + TILE,) * experts, router, parts[0].shared_size)
        stored = (price(longer) - here[0]) / (max(experts, 1) * TILE)
        active, tiled = (price(parts[0], **{name: TILE}) - here[0] for name in ("neurons", "tiled_neurons"))
        extent = self.pricer.context.extent(slot.stack)
        weights = {
            "expected": size_weights(self._loads(slot, group, router) or (), experts, router, extent),
            "worst": size_weights(None, experts, router, extent),
        }
        per_neuron = np.array([weights[case] for _, case in self.terms])  # [terms, 2, experts]
        slopes = stored + (per_neuron[:, 0].T * active + per_neuron[:, 1].T * tiled) / TILE
        return Choice(group, router, here + offset - slopes.sum(0) * size, slopes)

    def _loads(self, slot: Slot, group: FeedForwardGroup, router: Router | None) -> tuple[float, ...] | None:
        return self.pricer.occupancy.loads(slot, group.experts, router) if router else None

    def _first(self, stack: str, width: int) -> np.ndarray:
        """[terms] that the smallest layer at the first position adds: what a second one like it adds."""
        layer = self.space.stacks[stack].layers[0].smallest
        uses = self._uses(Slot(stack, 0), layer.feed_forward)
        one, two = (self._alone(stack, width, layer, *uses, copies=copies) for copies in (1, 2))
        return two - one

    def _alone(
        self, stack: str, width: int, layer: Layer, expected: LayerUse, worst: LayerUse, copies: int = 1
    ) -> np.ndarray:
        """[terms] of a network whose ``stack`` has only this layer, and every other one its smallest first layer."""
        stacks: dict[str, Stack] = {}
        uses: tuple[list[LayerUse], list[LayerUse]] = ([], [])
        for name, space in self.space.stacks.items():
            mine = name == stack
            smallest = space.layers[0].smallest
            layers = (layer,) * copies if mine else (smallest,)
            stacks[name] = space.build(width if mine else space.widths[0], layers)
            pair = (expected, worst) if mine else self._uses(Slot(name, 0), smallest.feed_forward)
            for case, use in zip(uses, pair, strict=True):
                case.extend([use] * len(layers))
        return self._priced(self.space.build(stacks), *uses)

    def _uses(self, slot: Slot, part: FeedForward) -> tuple[LayerUse, LayerUse]:
        """Expected and worst use."""
        return self.pricer.expected_use(slot, part), self.pricer.worst_use(slot, part)

    def _priced(self, architecture: Architecture, expected: list[LayerUse], worst: list[LayerUse]) -> np.ndarray:
        cases = {case for _, case in self.terms}
        priced = {
            case: self.pricer.price(architecture, uses)
            for case, uses in (("expected", expected), ("worst", worst))
            if case in cases
        }
        found = (
            _least_memory(architecture, self.pricer) if cost == "memory" else priced[case][cost]
            for cost, case in self.terms
        )
        return np.fromiter(found, float, len(self.terms))


def _least_memory(architecture: Architecture, pricer: Pricer) -> float:
    """Weights, cache and logits, without what layers hold in between."""
    context = pricer.context
    kept = weight_memory(architecture, context) + cache_memory(architecture, context)
    return kept + head_memory(architecture, context)
