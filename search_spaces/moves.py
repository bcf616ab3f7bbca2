"""Moves between architectures of a space: neighbours, mutation, crossover. No move changes its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import TypeVar

from moesaic.search_spaces.architecture import Architecture
from moesaic.search_spaces.parts import FeedForward, Layer
from moesaic.search_spaces.space import LayerSpace, SearchSpace

T = TypeVar("T")


def neighbours(space: SearchSpace, architecture: Architecture) -> list[Architecture]:
    """Every distinct member that differs from ``architecture`` by one step of one choice.

    One step is: the next width or depth of a stack (a deeper stack repeats its last layer if the space allows it),
    another pair of head counts, of cross-attention also another span, the next number of experts (an added expert may
    have any size), the next size of one expert, or of all where they are equal, another router or another shared size.
    """
    found = [move for kind in _STACK_MOVES for move in kind(space, architecture)]
    for kind in (*_LAYER_MOVES, _cross_moves):
        for slot, layer in architecture.layers.items():
            found += [architecture.with_layers({slot: changed}) for changed in kind(space.layers[slot], layer)]
    return found


def mutate(space: SearchSpace, architecture: Architecture, rng: Random, steps: int = 1) -> Architecture:
    """``steps`` random steps. Each draws a kind of move, then a layer, then a move: each uniformly, out of those that
    offer one, so that rare kinds and layers with few choices are not neglected. A step back may be more or less
    probable than the step."""
    for _ in range(steps):
        drawn = (step(space, architecture, rng) for step in _at_random(_steps_of(space), rng))
        architecture = next((a for a in drawn if a is not None), architecture)
    return architecture


def crossover(space: SearchSpace, first: Architecture, second: Architecture, rng: Random) -> Architecture:
    """A child that takes depth and width of each stack, and each layer by position, from a random parent; layers beyond
    the shorter parent come from the longer. It is a member, since every layer keeps its position."""
    stacks = {}
    for name, stack_space in space.stacks.items():
        parents = first.stacks[name], second.stacks[name]
        longer, shorter = sorted(parents, key=lambda stack: len(stack.layers), reverse=True)
        depth = len(rng.choice(parents).layers)
        layers = []
        for position in range(depth):
            donors = [stack for stack in (longer, shorter) if position < len(stack.layers)]
            layers.append(rng.choice(donors).layers[position])
        stacks[name] = stack_space.build(rng.choice(parents).width, tuple(layers))
    return space.build(stacks)


def _at_random(items: Sequence[T], rng: Random) -> Iterator[T]:
    """All items in random order, drawn lazily: a search draws a thousand steps a second."""
    left = list(items)
    while left:
        yield left.pop(rng.randrange(len(left)))


def _next_to(values: tuple[T, ...], value: T) -> list[T]:
    """The neighbours of ``value`` in a sorted tuple."""
    at = values.index(value)
    return list(values[max(0, at - 1) : at] + values[at + 1 : at + 2])


def _width_moves(space: SearchSpace, a: Architecture) -> list[Architecture]:
    return [
        space.build({**a.stacks, name: replace(stack, width=width)})
        for name, stack in a.stacks.items()
        for width in _next_to(space.stacks[name].widths, stack.width)
    ]


def _depth_moves(space: SearchSpace, a: Architecture) -> list[Architecture]:
    moves = []
    for name, stack in a.stacks.items():
        choices = space.stacks[name]
        for depth in _next_to(choices.depths, len(stack.layers)):
            layers = list(stack.layers[:depth])
            for layer_space in choices.layers[len(layers) : depth]:
                layers.append(layers[-1] if layer_space.why_not(layers[-1]) is None else layer_space.smallest)
            moves.append(space.build({**a.stacks, name: replace(stack, layers=tuple(layers))}))
    return moves


def _attention_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    return [replace(layer, attention=attention) for attention in space.attentions if attention != layer.attention]


def _cross_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    """Another span, or another pair of head counts."""
    mine = layer.cross
    if mine is None:
        return []
    others = [cross for cross in space.crosses if cross and cross != mine]
    near = [cross for cross in others if cross.span == mine.span or replace(cross, span=mine.span) == mine]
    return [replace(layer, cross=cross) for cross in near]


def _count_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    part = layer.feed_forward
    counts = tuple(group.experts for group in space.groups)
    moves = []
    for count in _next_to(counts, part.experts):
        group = space.group(count)
        assert group is not None
        nearest = {
            old: min(group.sizes, key=lambda s, old=old: abs(s - old)) for old in dict.fromkeys(part.expert_sizes)
        }
        sizes = tuple(nearest[old] for old in part.expert_sizes[: group.chosen])
        shared = part.shared_size if part.shared_size in group.shared_sizes else group.shared_sizes[0]
        router = part.router.for_experts(count) if part.router and count else None
        routers = (router,) if router in group.routers else group.routers
        for added in group.sizes if group.chosen > len(sizes) else (0,):
            grown = group.expert_sizes(sizes + (added,) * (group.chosen - len(sizes)))
            moves += [replace(layer, feed_forward=FeedForward(grown, router, shared)) for router in routers]
    return moves


def _size_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    part = layer.feed_forward
    group = space.group(part.experts)
    assert group is not None
    moves, chosen = [], part.expert_sizes[: group.chosen]
    for old in dict.fromkeys(chosen):  # experts of one size are one choice
        i = chosen.index(old)
        for size in _next_to(group.sizes, old):
            sizes = group.expert_sizes((*chosen[:i], size, *chosen[i + 1 :]))
            moves.append(replace(layer, feed_forward=FeedForward(sizes, part.router, part.shared_size)))
    return moves


def _router_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    part = layer.feed_forward
    group = space.group(part.experts)
    assert group is not None
    others = [router for router in group.routers if router != part.router]
    return [replace(layer, feed_forward=replace(part, router=router)) for router in others]


def _shared_moves(space: LayerSpace, layer: Layer) -> list[Layer]:
    part = layer.feed_forward
    group = space.group(part.experts)
    assert group is not None
    others = [size for size in group.shared_sizes if size != part.shared_size]
    return [replace(layer, feed_forward=replace(part, shared_size=size)) for size in others]


# Each kind gives distinct moves that change what no other kind changes.
StackMoves = Callable[[SearchSpace, Architecture], list[Architecture]]
LayerMoves = Callable[[LayerSpace, Layer], list[Layer]]


def _stack_step(kind: StackMoves, space: SearchSpace, a: Architecture, rng: Random) -> Architecture | None:
    moves = kind(space, a)
    return rng.choice(moves) if moves else None


def _layer_step(kind: LayerMoves, space: SearchSpace, a: Architecture, rng: Random) -> Architecture | None:
    for slot in _at_random(list(a.layers), rng):
        if moves := kind(space.layers[slot], a.layers[slot]):
            return a.with_layers({slot: rng.choice(moves)})
    return None


_STACK_MOVES: list[StackMoves] = [_width_moves, _depth_moves]
_LAYER_MOVES: list[LayerMoves] = [_attention_moves, _count_moves, _size_moves, _router_moves, _shared_moves]
_STEPS = [
    *(partial(_stack_step, kind) for kind in _STACK_MOVES),
    *(partial(_layer_step, kind) for kind in _LAYER_MOVES),
]


def _steps_of(space: SearchSpace) -> Sequence[Callable[[SearchSpace, Architecture, Random], Architecture | None]]:
    """A kind without moves is drawn too: spaces without an encoder leave one out, and draw what they drew before."""
    return _STEPS if space.encoder is None else [*_STEPS, partial(_layer_step, _cross_moves)]
