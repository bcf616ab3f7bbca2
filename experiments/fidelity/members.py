"""The stratified set of architectures that supernets are scored on: over the FLOP range, and in one narrow band."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from moesaic import Architecture, Pricer, SearchSpace, uniform_layouts
from moesaic.search_spaces import Router

SPREAD, BAND_RANDOM, BAND_UNIFORM, BAND_DENSE = 28, 12, 5, 3
BAND_WIDTH = 0.05
"""Members of the band are this close to its centre, by costs priced before training."""
_DRAWS = 4000
_TOP_2 = Router("top_k", k=2)


@dataclass(frozen=True)
class Member:
    number: int
    stratum: str
    architecture: Architecture


def stratified(space: SearchSpace, pricer: Pricer, centre: float, seed: int) -> list[Member]:
    """``SPREAD`` members, one from each of ``SPREAD`` equal steps of log FLOPs, then those of the band: random ones,
    uniform layouts with top-2 and dense ones. ``centre`` is in FLOPs per token."""
    rng = Random(f"{seed}/fidelity")
    drawn = sorted((space.sample_balanced(rng) for _ in range(_DRAWS)), key=lambda a: pricer.expected(a)["flops"])
    drawn = drawn[_DRAWS // 100 :]  # the cheapest hundredth comes from one corner of the space
    chosen = [("spread", a) for a in _over_the_range(drawn, pricer, rng)]

    def in_band(architectures: list[Architecture]) -> list[Architecture]:
        return [a for a in architectures if abs(pricer.expected(a)["flops"] / centre - 1) <= BAND_WIDTH]

    top_2 = [a for a in uniform_layouts(space, sparse=True) if a.decoder.layers[0].feed_forward.router == _TOP_2]
    for stratum, pool, count in (
        ("band", in_band([space.sample_balanced(rng) for _ in range(_DRAWS)]), BAND_RANDOM),
        ("band uniform top-2", in_band(top_2), BAND_UNIFORM),
        ("band dense", in_band(uniform_layouts(space, sparse=False)), BAND_DENSE),
    ):
        chosen += [(stratum, a) for a in rng.sample(pool, count)]
    return [Member(number, stratum, architecture) for number, (stratum, architecture) in enumerate(chosen)]


def _over_the_range(rising: list[Architecture], pricer: Pricer, rng: Random) -> Iterator[Architecture]:
    costs = [math.log(pricer.expected(a)["flops"]) for a in rising]
    step = (costs[-1] - costs[0]) / SPREAD
    for index in range(SPREAD):
        low = costs[0] + index * step
        yield rng.choice([a for a, cost in zip(rising, costs, strict=True) if low <= cost <= low + step])
