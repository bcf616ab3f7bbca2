"""Rivals of a search: the best uniform mixture of experts and the best dense model in the same budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from moesaic.nas.costs.price import Costs
from moesaic.nas.executors import Executor, evaluate_all
from moesaic.nas.search.budget import Budget
from moesaic.search_spaces import Architecture, Attention, CrossAttention, FeedForward, Layer, Router, SearchSpace
from moesaic.search_spaces.architecture import ArchitectureField
from moesaic.search_spaces.space import FeedForwardGroup, LayerSpace

JUDGED = 64
"""Number of uniform layouts evaluated by inherited loss: those with most FLOPs, since more compute is better."""


@dataclass(frozen=True)
class Rival:
    """``loss`` is inherited, ``costs`` are under the measured routing."""

    kind: Literal["uniform", "dense"]
    architecture: ArchitectureField
    loss: float
    costs: Costs


def judge_rivals(
    space: SearchSpace,
    budget: Budget,
    executor: Executor,
    on_judged: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Rival]]:
    """Uniform and dense layouts inside the budget by rising inherited loss, with the same evaluation, weights and
    budget as the search. A kind is left out if no member fits or none can be evaluated. ``on_judged`` gets how many of
    all layouts were evaluated, at the start too."""
    kinds: tuple[tuple[Literal["uniform", "dense"], list[Architecture]], ...] = (
        ("uniform", uniform_layouts(space, sparse=True)),
        ("dense", uniform_layouts(space, sparse=False)),
    )
    chosen: dict[Architecture, Literal["uniform", "dense"]] = {}
    for kind, layouts in kinds:
        inside = [a for a in layouts if budget.fits(a)]
        inside.sort(key=lambda a: (-budget.pricer.expected(a)["flops"], a.fingerprint))
        chosen |= dict.fromkeys(inside[:JUDGED], kind)
    on_judged(0, len(chosen))
    rivals: dict[str, list[Rival]] = {}
    for outcome in evaluate_all(executor, list(chosen), lambda done: on_judged(done, len(chosen))):
        architecture, evaluation = outcome.architecture, outcome.evaluation
        if evaluation is not None and math.isfinite(evaluation.loss):
            costs = budget.pricer.measured(architecture, evaluation.loads)
            kind = chosen[architecture]
            rivals.setdefault(kind, []).append(Rival(kind, architecture, evaluation.loss, costs))
    return {kind: sorted(judged, key=lambda rival: rival.loss) for kind, judged in rivals.items()}


def uniform_layouts(space: SearchSpace, sparse: bool) -> list[Architecture]:
    """Every architecture whose layers are all alike: experts of one size under one router, or one dense layer.

    Sizes, counts, heads and routers are those of the space. Top-2 is included even where the space does not offer it,
    because it is the usual choice. The stacks' layers differ in cross-attention alone, and that of all layers reads as
    many encoder layers.
    """
    layouts: dict[Architecture, None] = {}
    choices = [list(product(stack.widths, stack.depths)) for stack in space.stacks.values()]
    for shapes in product(*choices):
        shape = dict(zip(space.stacks, shapes, strict=True))
        spaces = [layer for name, (_, depth) in shape.items() for layer in space.stacks[name].layers[:depth]]
        for layer in _common_layers(spaces, sparse):
            for cross in _common_crosses(spaces, layer.attention):
                stacks = {}
                for name, (width, depth) in shape.items():
                    reads = space.stacks[name].layers[0].crosses != (None,)
                    alike = replace(layer, cross=cross) if reads else layer
                    stacks[name] = space.stacks[name].build(width, (alike,) * depth)
                layouts[space.build(stacks)] = None
    return list(layouts)


def habit(group: FeedForwardGroup) -> Router | None:
    """The usual router, top-2, with weights like those of the group's routers; None if dense. The parts of a layer that
    was dense have no usual router: their first one."""
    first = group.routers[0]
    return first if first is None or first.predicts_mass else Router("top_k", k=2, weights=first.weights)


def _common_crosses(spaces: list[LayerSpace], attention: Attention) -> list[CrossAttention | None]:
    """Cross-attention that all decoder layers of ``spaces`` may have; with the heads of ``attention`` if possible."""
    first, *others = [space.crosses for space in spaces if space.crosses != (None,)] or [(None,)]
    common = [cross for cross in first if all(cross in crosses for crosses in others)]
    heads = attention.heads, attention.kv_heads
    return [cross for cross in common if cross and (cross.heads, cross.kv_heads) == heads] or common


def _common_layers(spaces: list[LayerSpace], sparse: bool) -> list[Layer]:
    """Layers that all of ``spaces`` contain, ignoring router and cross-attention."""
    attentions: list[Attention] = [a for a in spaces[0].attentions if all(a in s.attentions for s in spaces)]
    layers = []
    for group in spaces[0].groups:
        if (group.experts > 1) != sparse:
            continue
        groups = [s.group(group.experts) for s in spaces]
        offered = [r for r in group.routers if all(g and r in g.routers for g in groups)]
        routers = dict.fromkeys([habit(group), *offered]) if sparse else (None,)
        for attention, size, shared in product(attentions, group.sizes, group.shared_sizes):
            if all(g and size in g.sizes and shared in g.shared_sizes for g in groups):
                sizes = (size,) * group.experts
                layers += [Layer(attention, FeedForward(sizes, router, shared)) for router in routers]
    return layers
