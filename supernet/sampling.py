"""Which slices of the supernet train at each step: the largest alone at first, then the sandwich rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, TypeVar

from search_spaces import Architecture, Layer, SearchSpace

T = TypeVar("T")


@dataclass(frozen=True)
class Sandwich:
    """Largest, smallest and ``random_slices`` random members at every step (arXiv 1903.05134).

    A pure function of seed and step, so that a resumed run trains the same slices. ``fair`` sampling deals every
    choice of width, depth, number of experts and router like a deck of cards: each value comes up once before any
    comes up again (FairNAS, arXiv 1907.01845), so no number of experts is trained less than another by bad luck.
    ``uniform`` draws each choice independently.

    During the first ``largest_first`` steps the largest trains alone (progressive shrinking, arXiv 1908.09791):
    slices that all still have to learn everything hold each other back for long.
    """

    space: SearchSpace
    seed: int
    random_slices: int = 1
    sampling: Literal["fair", "uniform", "flops"] = "fair"
    largest_first: int = 0
    steps: int = 0
    always: Literal["both", "largest", "none"] = "both"
    anneal: bool = False
    staged: bool = False

    def slices(self, step: int) -> list[Architecture]:
        """The slices of ``step``, largest first: it is the teacher of the others."""
        if step < self.largest_first:
            return [self.space.largest]
        first = (step - self.largest_first) * self.random_slices
        drawn = [self._draw(first + i) for i in range(self.random_slices)]
        done = (step - self.largest_first) / max(1, self.steps - self.largest_first)
        if self.staged:
            drawn = [self._unshrunk(a, done) for a in drawn]
        if self.anneal:
            drawn = [_annealed(a, max(0.0, 1 - done / 0.7)) for a in drawn]
        kept = {"both": [self.space.largest, self.space.smallest], "largest": [self.space.largest], "none": []}
        return [*kept[self.always], *drawn]

    def _unshrunk(self, a: Architecture, done: float) -> Architecture:
        stack, largest = a.decoder, self.space.largest.decoder
        layers = stack.layers if done > 0.33 else (*stack.layers, *largest.layers[len(stack.layers) :])
        return self.space.build(stack.width if done > 0.66 else largest.width, layers)

    def _draw(self, draw: int) -> Architecture:
        rng = Random(f"{self.seed}/slice/{draw}")
        if self.sampling == "flops":
            low, high = (math.log(_compute(a)) for a in (self.space.smallest, self.space.largest))
            aim = low + (high - low) * (self._deal(range(8), "flops", draw) + rng.random()) / 8
            pool = [self.space.sample_balanced(rng) for _ in range(16)]
            return min(pool, key=lambda a: abs(math.log(_compute(a)) - aim))
        if self.sampling == "uniform":
            return self.space.sample_balanced(rng)
        depth = self._deal(self.space.depths, "depth", draw)
        layers = []
        for index, choices in enumerate(self.space.layers[:depth]):
            turn = self._turn(index, draw)
            group = self._deal(choices.groups, f"experts {index}", turn)
            part = group.sample(rng)
            router = self._deal(group.routers, f"router {index} {group.experts}", turn // len(choices.groups))
            part = type(part)(part.expert_sizes, router, part.shared_size)
            layers.append(Layer(rng.choice(choices.attentions), part))
        return self.space.build(self._deal(self.space.widths, "width", draw), tuple(layers))

    def _turn(self, layer: int, draw: int) -> int:
        """How many draws before ``draw`` had that layer: a deck must not lose cards to networks too shallow for it."""
        depths = self.space.depths
        deck, card = divmod(draw, len(depths))
        deep, ahead = (sum(depth > layer for depth in d) for d in (depths, self._deck(depths, "depth", deck)[:card]))
        return deck * deep + ahead

    def _deal(self, values: Sequence[T], name: str, draw: int) -> T:
        """Card number ``draw`` of an endless deal of shuffled decks of ``values``."""
        deck, card = divmod(draw, len(values))
        return self._deck(values, name, deck)[card]

    def _deck(self, values: Sequence[T], name: str, deck: int) -> list[T]:
        return Random(f"{self.seed}/{name}/{deck}").sample(list(values), len(values))


def _compute(a: Architecture) -> float:
    """About the weights that a token uses, without the vocabulary."""
    rows = sum(
        2 * 32 * (layer.attention.heads + layer.attention.kv_heads) + 3 * layer.feed_forward.worst_active_neurons
        for layer in a.decoder.layers
    )
    return float(a.decoder.width * rows)


def _annealed(a: Architecture, warm: float) -> Architecture:
    layers = []
    for layer in a.decoder.layers:
        part = layer.feed_forward
        if part.router is not None and part.router.threshold is not None:
            threshold = part.router.threshold + (0.99 - part.router.threshold) * warm
            part = replace(part, router=replace(part.router, threshold=threshold))
        layers.append(replace(layer, feed_forward=part))
    return replace(a, decoder=replace(a.decoder, layers=tuple(layers)))
