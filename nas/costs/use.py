"""How much of a sparse layer its tokens use: expected, worst, measured on text, or counted in one batch.

Compute follows the load of each expert, and a threshold router's load depends on the data. What is expected comes
from the loads that were measured on the trained supernet; before that, from routers that spread tokens evenly and,
where they have a threshold, cannot tell experts apart yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from moesaic.nas.context import Context
from moesaic.search_spaces import FeedForward, Router
from moesaic.supernet.evaluate import LayerLoad


@dataclass(frozen=True)
class LayerUse:
    """What the tokens of one pass make of a layer's routed experts.

    Per token: ``pairs`` (experts it is sent to), their ``neurons``, ``tiled_neurons`` (the same with each expert's
    rows rounded up to whole tiles), ``largest_neurons`` (the part of ``neurons`` in the expert that has most). Per
    pass: ``live_experts`` that have a token.
    """

    pairs: float
    neurons: float
    tiled_neurons: float
    largest_neurons: float
    live_experts: float


@dataclass(frozen=True)
class Occupancy:
    """Pairs per token of each expert, the largest first, as the routers of a supernet were measured to load them.

    By layer, number of experts and router: what slices of one supernet share is where a router is and what it chooses
    from, so the load of one slice's experts says much of another's.
    """

    measured: Mapping[tuple[int, int, Router], tuple[float, ...]] = field(default_factory=dict)

    def loads(self, layer: int, experts: int, router: Router) -> tuple[float, ...]:
        """Measured pairs per token of each expert. Without a measurement they are even, and a threshold router keeps
        the most experts it can, which is what it does while it cannot tell them apart."""
        known = self.measured.get((layer, experts, router))
        return known if known is not None else even(experts, router.for_experts(experts).most)

    def expected(self, layer: int, part: FeedForward, context: Context) -> LayerUse:
        """Use of ``part`` as layer number ``layer``."""
        if part.router is None:
            return dense_use(part)
        return measured_use(part, LayerLoad(self.loads(layer, part.experts, part.router)), context)

    def to_rows(self) -> list[dict]:
        return [
            {"layer": layer, "experts": experts, "router": asdict(router), "pairs_per_token": list(loads)}
            for (layer, experts, router), loads in self.measured.items()
        ]

    @staticmethod
    def from_rows(rows: list[dict]) -> Occupancy:
        return Occupancy(
            {(row["layer"], row["experts"], Router(**row["router"])): tuple(row["pairs_per_token"]) for row in rows}
        )


def even(experts: int, pairs: float) -> tuple[float, ...]:
    """``pairs`` per token spread evenly."""
    return (pairs / experts,) * experts


def worst_use(part: FeedForward, context: Context) -> LayerUse:
    """Every token takes as many experts as its router allows, and the largest ones; yet all experts that the pairs
    suffice for have some, each with a tile that is all but empty."""
    if part.router is None:
        return dense_use(part)
    neurons = part.worst_active_neurons - part.shared_size
    live = min(part.experts, context.tokens * part.router.most)
    waste = (context.row_tile - 1) / context.tokens * sum(part.expert_sizes[:live])
    return LayerUse(part.router.most, neurons, neurons + waste, part.expert_sizes[0], live)


def measured_use(part: FeedForward, load: LayerLoad, context: Context) -> LayerUse:
    """What a pass over text like that of ``load`` uses."""
    loads = load.pairs_per_token
    return _use(part, loads, _expected_live(loads, context), _expected_rows(loads, context), context)


def counted_use(part: FeedForward, rows: Sequence[int], context: Context) -> LayerUse:
    """What one pass used that sent ``rows[e]`` tokens to expert e."""
    tile, tokens = context.row_tile, context.tokens
    live = [float(count > 0) for count in rows]
    return _use(part, [count / tokens for count in rows], live, [-(-count // tile) * tile for count in rows], context)


def _use(
    part: FeedForward, loads: Sequence[float], live: Sequence[float], rows: Sequence[float], context: Context
) -> LayerUse:
    neurons = [load * size for load, size in zip(loads, part.expert_sizes, strict=True)]
    tiled = sum(count * size for count, size in zip(rows, part.expert_sizes, strict=True))
    return LayerUse(sum(loads), sum(neurons), tiled / context.tokens, max(neurons), sum(live))


def dense_use(part: FeedForward) -> LayerUse:
    """A layer of one expert that every token uses."""
    neurons = part.neurons - part.shared_size
    return LayerUse(1, neurons, neurons, neurons, 1)


def _expected_live(loads: Sequence[float], context: Context) -> list[float]:
    """Probability of each expert to have a token, when the tokens of a pass choose independently."""
    tokens = context.tokens
    return [1 - (1 - min(load, 1.0)) ** tokens for load in loads]


def _expected_rows(loads: Sequence[float], context: Context) -> list[float]:
    """Rows of each expert rounded up to tiles, to a good approximation (a tile at least where it is live, half a tile
    of waste where there are many)."""
    tokens, tile = context.tokens, context.row_tile
    return [
        max(tokens * load + share * (tile - 1) / 2, tile * share)
        for load, share in zip(loads, _expected_live(loads, context), strict=True)
    ]
