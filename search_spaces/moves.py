"""Moves between architectures of a space: neighbours, mutation, crossover. No move changes its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import TypeVar

from search_spaces.architecture import Architecture, FeedForward, Layer
from search_spaces.space import LayerSpace, SearchSpace

T = TypeVar("T")
Moves = Callable[[SearchSpace, Architecture, Sequence[int]], Iterator[list[Architecture]]]
"""What one kind of step makes of a network: a list for each of the given positions, or one of all of it."""


def neighbours(space: SearchSpace, architecture: Architecture) -> list[Architecture]:
    """Every distinct member that differs from ``architecture`` by one step of one choice.

    One step is: width or depth to the next value (a deeper network repeats its last layer where that is a member),
    another pair of head counts, one expert more or less (any size; the next number of experts that the space has),
    one expert's size to the next value, another router or shared size.
    """
    positions = range(len(architecture.decoder.layers))
    found = [a for kind in _MOVES for moves in kind(space, architecture, positions) for a in moves]
    return [a for a in dict.fromkeys(found) if a != architecture]


def mutate(space: SearchSpace, architecture: Architecture, rng: Random, steps: int = 1) -> Architecture:
    """``steps`` random steps; each first draws the kind of move, then the layer, so that neither rare kinds nor layers
    with few choices are drowned."""
    for _ in range(steps):
        architecture = _step(space, architecture, rng)
    return architecture


def _step(space: SearchSpace, architecture: Architecture, rng: Random) -> Architecture:
    depth = len(architecture.decoder.layers)
    positions = rng.sample(range(depth), depth)
    for kind in rng.sample(_MOVES, len(_MOVES)):
        for moves in kind(space, architecture, positions):
            if candidates := [a for a in moves if a != architecture]:
                return rng.choice(candidates)
    return architecture


def crossover(space: SearchSpace, first: Architecture, second: Architecture, rng: Random) -> Architecture:
    """A child with depth and width of either parent and each layer of either, by position (a longer parent's tail
    is its own). Always a member: every layer comes from the same position of a member."""
    longer, shorter = sorted((first, second), key=lambda a: len(a.decoder.layers), reverse=True)
    depth = len(rng.choice((first, second)).decoder.layers)
    layers = []
    for position in range(depth):
        donors = [a for a in (longer, shorter) if position < len(a.decoder.layers)]
        layers.append(rng.choice(donors).decoder.layers[position])
    return space.build(rng.choice((first, second)).decoder.width, tuple(layers))


def _next_to(values: tuple[T, ...], value: T) -> list[T]:
    """The values beside ``value`` in a rising tuple."""
    at = values.index(value)
    return list(values[max(0, at - 1) : at] + values[at + 1 : at + 2])


def _width_moves(space: SearchSpace, a: Architecture) -> list[Architecture]:
    return [space.build(width, a.decoder.layers) for width in _next_to(space.widths, a.decoder.width)]


def _depth_moves(space: SearchSpace, a: Architecture) -> list[Architecture]:
    moves = []
    for depth in _next_to(space.depths, len(a.decoder.layers)):
        layers = list(a.decoder.layers[:depth])
        for position in range(len(layers), depth):
            copy = layers[-1]
            smallest = space.smallest_layer(position)
            layers.append(copy if space.layers[position].why_not(copy) is None else smallest)
        moves.append(space.build(a.decoder.width, tuple(layers)))
    return moves


def _of_network(kind: Callable[[SearchSpace, Architecture], list[Architecture]]) -> Moves:
    def moves(space: SearchSpace, a: Architecture, positions: Sequence[int]) -> Iterator[list[Architecture]]:
        yield kind(space, a)

    return moves


def _of_layers(kind: Callable[[LayerSpace, Layer], list[Layer]]) -> Moves:
    def moves(space: SearchSpace, a: Architecture, positions: Sequence[int]) -> Iterator[list[Architecture]]:
        layers = a.decoder.layers
        for i in positions:
            changes = kind(space.layers[i], layers[i])
            yield [space.build(a.decoder.width, (*layers[:i], changed, *layers[i + 1 :])) for changed in changes]

    return moves


def _attention_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    return [replace(layer, attention=attention) for attention in space.attentions]


def _count_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    part = layer.feed_forward
    counts = tuple(group.experts for group in space.groups)
    moves = []
    for count in _next_to(counts, part.experts):
        group = space.group(count)
        assert group is not None
        sizes = tuple(min(group.sizes, key=lambda s, old=old: abs(s - old)) for old in part.expert_sizes[:count])
        shared = part.shared_size if part.shared_size in group.shared_sizes else group.shared_sizes[0]
        router = part.router.for_experts(count) if part.router else None
        routers = (router,) if router in group.routers else group.routers
        for added in group.sizes if count > len(sizes) else (0,):
            grown = sizes + (added,) * (count - len(sizes))
            moves += [replace(layer, feed_forward=FeedForward(grown, router, shared)) for router in routers]
    return moves


def _size_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    part = layer.feed_forward
    group = space.group(part.experts)
    assert group is not None
    moves = []
    for i, old in enumerate(part.expert_sizes):
        for size in _next_to(group.sizes, old):
            sizes = (*part.expert_sizes[:i], size, *part.expert_sizes[i + 1 :])
            moves.append(replace(layer, feed_forward=replace(part, expert_sizes=sizes)))
    return moves


def _router_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    part = layer.feed_forward
    group = space.group(part.experts)
    assert group is not None
    return [replace(layer, feed_forward=replace(part, router=router)) for router in group.routers]


def _shared_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    part = layer.feed_forward
    group = space.group(part.experts)
    assert group is not None
    return [replace(layer, feed_forward=replace(part, shared_size=size)) for size in group.shared_sizes]


_MOVES: list[Moves] = [
    *(_of_network(kind) for kind in (_width_moves, _depth_moves)),
    *(_of_layers(k) for k in (_attention_moves, _count_moves, _size_moves, _router_moves, _shared_moves)),
]
