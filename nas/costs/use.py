"""How much of a sparse layer its tokens use: expected, worst, measured on text, or counted in one batch.

Compute follows the load of each expert, and a threshold router's load depends on the data. Expected use comes from
the loads measured on the trained supernet. Before that, routers are assumed to spread tokens evenly and, where they
have a threshold, not to tell experts apart yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from moesaic.kernels.workspace import product_rows
from moesaic.nas.context import Extent
from moesaic.search_spaces import FeedForward, Router, Slot
from moesaic.supernet.evaluate import LayerLoad


@dataclass(frozen=True)
class LayerUse:
    """How the tokens of one pass use a layer's routed experts.

    Per token: ``pairs`` (experts it is sent to), their ``neurons``, ``tiled_neurons`` (the same with each expert's
    rows rounded up to whole tiles), ``largest_neurons`` (the part of ``neurons`` in the expert that has most),
    ``largest_pairs`` (the part of ``pairs`` of the most loaded expert). Per pass: ``live_experts`` that have a token.
    """

    pairs: float
    neurons: float
    tiled_neurons: float
    largest_neurons: float
    largest_pairs: float
    live_experts: float


@dataclass(frozen=True)
class Occupancy:
    """Pairs per token of each expert, the largest first, as measured under the routers of a supernet.

    Keyed by slot, number of experts and router: slices that share these choose from the same experts in the same place,
    so the load of one slice predicts that of another.
    """

    measured: Mapping[tuple[Slot, int, Router], tuple[float, ...]] = field(default_factory=dict)

    def loads(self, slot: Slot, experts: int, router: Router) -> tuple[float, ...]:
        """Measured pairs per token of each expert. Without a measurement the load is even, and a threshold router keeps
        the most experts it can, as it does while it cannot tell them apart."""
        known = self.measured.get((slot, experts, router))
        return known if known is not None else even(experts, router.for_experts(experts).max_experts)

    def expected(self, slot: Slot, part: FeedForward, extent: Extent) -> LayerUse:
        """Use of ``part`` in the layer at ``slot``."""
        if part.router is None:
            return dense_use(part)
        return measured_use(part, LayerLoad(self.loads(slot, part.experts, part.router)), extent)

    def at(self, slot: Slot) -> frozenset:
        """What was measured at ``slot``: slots where it is equal use equal parts alike."""
        return self._by_slot.get(slot, frozenset())

    @cached_property
    def _by_slot(self) -> dict[Slot, frozenset]:
        found: dict[Slot, set] = {}
        for (slot, experts, router), loads in self.measured.items():
            found.setdefault(slot, set()).add((experts, router, loads))
        return {slot: frozenset(loads) for slot, loads in found.items()}

    def rows(self) -> list[OccupancyRow]:
        """The same as a list, for a file."""
        measured = self.measured.items()
        return [OccupancyRow(at.stack, at.index, experts, router, loads) for (at, experts, router), loads in measured]

    @staticmethod
    def of(rows: Sequence[OccupancyRow]) -> Occupancy:
        return Occupancy({(Slot(row.stack, row.index), row.experts, row.router): row.pairs_per_token for row in rows})


@dataclass(frozen=True)
class OccupancyRow:
    """The measured load under one router of one layer."""

    stack: str
    index: int
    experts: int
    router: Router
    pairs_per_token: tuple[float, ...]


def even(experts: int, pairs: float) -> tuple[float, ...]:
    """``pairs`` per token spread evenly."""
    return (pairs / experts,) * experts


def worst_use(part: FeedForward, extent: Extent) -> LayerUse:
    """Worst case: every token takes as many experts as its router allows, and the largest ones. Still, as many experts
    as possible are live, each with a nearly empty tile."""
    if part.router is None:
        return dense_use(part)
    neurons = part.worst_active_neurons - part.shared_size
    live = min(part.experts, extent.tokens * part.router.max_experts)
    waste = (_row_tile(part.experts, part.router, extent) - 1) / extent.tokens * sum(part.expert_sizes[:live])
    return LayerUse(part.router.max_experts, neurons, neurons + waste, part.expert_sizes[0], 1, live)


def measured_use(part: FeedForward, load: LayerLoad, extent: Extent) -> LayerUse:
    """Use in a pass over text like that of ``load``."""
    assert part.router is not None
    loads = load.pairs_per_token
    rows = _expected_rows(loads, extent, _row_tile(part.experts, part.router, extent))
    return _use(part, loads, _expected_live(loads, extent), rows, extent)


def counted_use(part: FeedForward, rows: Sequence[int], extent: Extent) -> LayerUse:
    """Use in one pass that sent ``rows[e]`` tokens to expert e."""
    assert part.router is not None
    tile, tokens = _row_tile(part.experts, part.router, extent), extent.tokens
    live = [float(count > 0) for count in rows]
    return _use(part, [count / tokens for count in rows], live, [-(-count // tile) * tile for count in rows], extent)


def _use(
    part: FeedForward, loads: Sequence[float], live: Sequence[float], rows: Sequence[float], extent: Extent
) -> LayerUse:
    neurons = [load * size for load, size in zip(loads, part.expert_sizes, strict=True)]
    tiled = sum(count * size for count, size in zip(rows, part.expert_sizes, strict=True))
    return LayerUse(sum(loads), sum(neurons), tiled / extent.tokens, max(neurons), max(loads), sum(live))


def size_weights(
    loads: tuple[float, ...] | None, experts: int, router: Router | None, extent: Extent
) -> tuple[np.ndarray, np.ndarray]:
    """[experts] twice: how much one neuron of each expert, the largest first, adds to ``neurons`` and to
    ``tiled_neurons`` of the expected use under ``loads``, or of the worst use (None). Both are linear in the sizes."""
    if router is None:
        return np.ones(experts), np.ones(experts)
    tile = _row_tile(experts, router, extent)
    if loads is not None:
        return np.array(loads), np.array(_expected_rows(loads, extent, tile)) / extent.tokens
    at = np.arange(experts)
    taken = (at < router.max_experts).astype(float)
    live = at < min(experts, extent.tokens * router.max_experts)
    return taken, taken + live * (tile - 1) / extent.tokens


def dense_use(part: FeedForward) -> LayerUse:
    """A layer of one expert that every token uses, or of none."""
    neurons = part.neurons - part.shared_size
    return LayerUse(1, neurons, neurons, neurons, 1, 1)


@lru_cache(maxsize=1024)
def _expected_live(loads: tuple[float, ...], extent: Extent) -> list[float]:
    """Probability that each expert has a token, when the tokens of a pass choose independently."""
    tokens = extent.tokens
    return [1 - (1 - min(load, 1.0)) ** tokens for load in loads]


def _row_tile(experts: int, router: Router, extent: Extent) -> int:
    return product_rows(extent.implementation, extent.tokens, experts, router.max_experts)


@lru_cache(maxsize=1024)
def _expected_rows(loads: tuple[float, ...], extent: Extent, tile: int) -> list[float]:
    """Rows of each expert rounded up to whole tiles, approximately: at least one tile for a live expert, and half a
    tile of waste for an expert with many rows."""
    tokens = extent.tokens
    return [
        max(tokens * load + share * (tile - 1) / 2, tile * share)
        for load, share in zip(loads, _expected_live(loads, extent), strict=True)
    ]
