"""Which slices of the supernet train at each step: the largest alone at first, then random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from moesaic.search_spaces import Architecture, Layer, SearchSpace, Slot, Stack, StackSpace

T = TypeVar("T")


@dataclass(frozen=True)
class SliceSampler:
    """One random member per step; in the first ``largest_first`` steps only the largest, so that slices start from
    trained weights (progressive shrinking, arXiv 1908.09791).

    A pure function of seed and step, so that a resumed run trains the same slices. Width, depth, number of experts and
    router are each dealt like a deck of cards: every value comes up once before any comes up again (FairNAS, arXiv
    1907.01845), so all numbers of experts are trained equally often.

    The sandwich rule with in-place distillation (arXiv 1903.05134, 2003.11142) ranked no better at equal time, since
    its largest slice takes most of the time: docs/fidelity.md.
    """

    space: SearchSpace
    seed: int
    largest_first: int = 0

    def slices(self, step: int) -> list[Architecture]:
        """The slices of ``step``."""
        if step < self.largest_first:
            return [self.space.largest]
        return [self._draw(step - self.largest_first)]

    def _draw(self, draw: int) -> Architecture:
        rng = Random(f"{self.seed}/slice/{draw}")
        return self.space.build(
            {name: self._stack(name, stack, draw, rng) for name, stack in self.space.stacks.items()}
        )

    def _stack(self, name: str, space: StackSpace, draw: int, rng: Random) -> Stack:
        depth = self._deal(space.depths, f"depth {name}", draw)
        layers = []
        for index, choices in enumerate(space.layers[:depth]):
            slot = Slot(name, index)
            turn = self._turn(slot, space.depths, draw)
            group = self._deal(choices.groups, f"experts {slot}", turn)
            part = group.sample(rng)
            router = self._deal(group.routers, f"router {slot} {group.experts}", turn // len(choices.groups))
            part = type(part)(part.expert_sizes, router, part.shared_size)
            layers.append(Layer(rng.choice(choices.attentions), part, choices.sample_cross(rng)))
        return space.build(self._deal(space.widths, f"width {name}", draw), tuple(layers))

    def _turn(self, slot: Slot, depths: Sequence[int], draw: int) -> int:
        """How many draws before ``draw`` had that layer. Shallower networks must not use up the cards of its decks."""
        deck, card = divmod(draw, len(depths))
        before = self._deck(depths, f"depth {slot.stack}", deck)[:card]
        deep, ahead = (sum(depth > slot.index for depth in some) for some in (depths, before))
        return deck * deep + ahead

    def _deal(self, values: Sequence[T], name: str, draw: int) -> T:
        """Card number ``draw`` of an endless sequence of shuffled decks of ``values``."""
        deck, card = divmod(draw, len(values))
        return self._deck(values, name, deck)[card]

    def _deck(self, values: Sequence[T], name: str, deck: int) -> list[T]:
        return Random(f"{self.seed}/{name}/{deck}").sample(list(values), len(values))
