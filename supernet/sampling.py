"""Which slices of the supernet train at each step: the largest alone at first, then random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

from moesaic.search_spaces import Architecture, Layer, SearchSpace

T = TypeVar("T")


@dataclass(frozen=True)
class SliceSampler:
    """``random_slices`` random members at every step; in the first ``largest_first`` steps the largest alone, so that
    slices start from weights that can already do something (progressive shrinking, arXiv 1908.09791).

    A pure function of seed and step, so that a resumed run trains the same slices. ``fair`` sampling deals every
    choice of width, depth, number of experts and router like a deck of cards: each value comes up once before any
    comes up again (FairNAS, arXiv 1907.01845), so no number of experts is trained less than another by bad luck.
    ``uniform`` draws each choice independently.

    The sandwich rule with in-place distillation (arXiv 1903.05134, 2003.11142) was measured beside this and ranked no
    better at equal time, since its largest slice takes most of it: docs/fidelity.md.
    """

    space: SearchSpace
    seed: int
    random_slices: int = 1
    sampling: Literal["fair", "uniform"] = "fair"
    largest_first: int = 0

    def slices(self, step: int) -> list[Architecture]:
        """The slices of ``step``."""
        if step < self.largest_first:
            return [self.space.largest]
        first = (step - self.largest_first) * self.random_slices
        return [self._draw(first + i) for i in range(self.random_slices)]

    def _draw(self, draw: int) -> Architecture:
        rng = Random(f"{self.seed}/slice/{draw}")
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
