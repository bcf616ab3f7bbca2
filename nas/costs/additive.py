"""Costs as sums over layers, and each layer's as a linear function of its expert sizes: what exact sampling works on.

At given widths, FLOPs, parameters, active parameters and predicted latency are such sums. Memory is not, since it has a
peak, but it is at least the weights, the cache and the logits, which are. All figures come from the pricer, by
differences of networks with one layer, so that each formula exists once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from moesaic.nas.costs.memory import cache_memory, head_memory, weight_memory
from moesaic.nas.costs.price import Pricer
from moesaic.nas.costs.use import LayerUse, size_weights
from moesaic.search_spaces import Architecture, FeedForward, Layer, Router, SearchSpace, Slot
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
    """What the choices of a layer add, at given widths: ``attentions`` [attentions, terms], ``crosses`` [crosses,
    terms], and the feed-forward parts."""

    attentions: np.ndarray
    crosses: np.ndarray
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
        """[terms] of a network of these widths, one for each stack, without layers."""
        named = self._named(widths)
        output, stack = list(self.space.stacks.items())[-1]
        first = stack.layers[0].smallest
        uses = self._uses(Slot(output, 0), first.feed_forward)
        least = self.space.only(output, (first,), named)
        counts = {name: len(stack.layers) for name, stack in least.stacks.items()}
        whole = self._alone(output, named, first, *uses)
        return whole - sum(count * self._first(name, named) for name, count in counts.items())

    def layer(self, slot: Slot, widths: Sequence[int]) -> LayerCosts:
        """The choices at ``slot`` in a network of these widths. Layers with equal choices and loads share one value."""
        space, named = self.space.layers[slot], self._named(widths)
        memory = named.get("encoder") if space.smallest.cross else None  # what another stack's width matters for
        key = (slot.stack, space, named[slot.stack], memory, self.pricer.occupancy.at(slot))
        if key not in self._layers:
            self._layers[key] = self._layer(slot, space, named)
        return self._layers[key]

    def _named(self, widths: Sequence[int]) -> dict[str, int]:
        return dict(zip(self.space.stacks, widths, strict=True))

    def _layer(self, slot: Slot, space: LayerSpace, widths: Mapping[str, int]) -> LayerCosts:
        least = space.smallest
        uses = self._uses(slot, least.feed_forward)
        smallest = self._alone(slot.stack, widths, least, *uses)
        first = self.space.stacks[slot.stack].layers[0].smallest
        before = self._alone(slot.stack, widths, first, *self._uses(Slot(slot.stack, 0), first.feed_forward))
        offset = self._first(slot.stack, widths) - before

        def more(layer: Layer) -> np.ndarray:
            return self._alone(slot.stack, widths, layer, *uses) - smallest

        choices = [
            self._choice(slot, widths, group, router, least, offset)
            for group in space.groups
            for router in group.routers
        ]
        return LayerCosts(
            np.array([more(replace(least, attention=attention)) for attention in space.attentions]),
            np.array([more(replace(least, cross=cross)) for cross in space.crosses]),
            tuple(choices),
        )

    def _choice(
        self,
        slot: Slot,
        widths: Mapping[str, int],
        group: FeedForwardGroup,
        router: Router | None,
        least: Layer,
        offset: np.ndarray,
    ) -> Choice:
        """``offset`` brings a price of a network with one layer to what that layer adds; ``least`` is the smallest."""
        size, experts = group.sizes[0], group.experts
        parts = [FeedForward((size,) * experts, router, shared) for shared in group.shared_sizes]
        expected, worst = self._uses(slot, parts[0])

        def price(part: FeedForward, **more: float) -> np.ndarray:
            uses = (
                replace(use, **{name: getattr(use, name) + n for name, n in more.items()}) for use in (expected, worst)
            )
            return self._alone(slot.stack, widths, replace(least, feed_forward=part), next(uses), next(uses))

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

    def _first(self, stack: str, widths: Mapping[str, int]) -> np.ndarray:
        """[terms] that the smallest layer at the first position adds: what a second one like it adds."""
        layer = self.space.stacks[stack].layers[0].smallest
        uses = self._uses(Slot(stack, 0), layer.feed_forward)
        one, two = (self._alone(stack, widths, layer, *uses, copies=copies) for copies in (1, 2))
        return two - one

    def _alone(
        self,
        stack: str,
        widths: Mapping[str, int],
        layer: Layer,
        expected: LayerUse,
        worst: LayerUse,
        copies: int = 1,
    ) -> np.ndarray:
        """[terms] of a network whose ``stack`` begins with this layer, and has as little as possible beside it."""
        network = self.space.only(stack, (layer,) * copies, widths)
        pairs = [
            (expected, worst)
            if at.stack == stack and at.index < copies
            else self._uses(Slot(at.stack, 0), one.feed_forward)
            for at, one in network.layers.items()
        ]
        return self._priced(network, [pair[0] for pair in pairs], [pair[1] for pair in pairs])

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
