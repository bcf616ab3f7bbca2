"""Which slices of the supernet train at each step: the sandwich rule with fair or uniform random slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """

    space: SearchSpace
    seed: int
    random_slices: int = 1
    sampling: Literal["fair", "uniform"] = "fair"

    def slices(self, step: int) -> list[Architecture]:
        """The slices of ``step``, largest first: it is the teacher of the others."""
        first = step * self.random_slices
        drawn = [self._draw(first + i) for i in range(self.random_slices)]
        return [self.space.largest, self.space.smallest, *drawn]

    def _draw(self, draw: int) -> Architecture:
        rng = Random(f"{self.seed}/slice/{draw}")
        if self.sampling == "uniform":
            return self.space.sample_balanced(rng)
        depth = self._deal(self.space.depths, "depth", draw)
        layers = []
        for index, choices in enumerate(self.space.layers[:depth]):
            group = self._deal(choices.groups, f"experts {index}", draw)
            part = group.sample(rng)
            router = self._deal(group.routers, f"router {index} {group.experts}", draw // len(choices.groups))
            part = type(part)(part.expert_sizes, router, part.shared_size)
            layers.append(Layer(rng.choice(choices.attentions), part))
        return self.space.build(self._deal(self.space.widths, "width", draw), tuple(layers))

    def _deal(self, values: Sequence[T], name: str, draw: int) -> T:
        """Card number ``draw`` of an endless deal of shuffled decks of ``values``."""
        deck, card = divmod(draw, len(values))
        return Random(f"{self.seed}/{name}/{deck}").sample(list(values), len(values))[card]
