"""Which architectures exist: a search space, its size, its members, its sampling.

A space is the product of independent choices: one width and depth per stack, and per layer a pair of head
counts and a feed-forward part. Feed-forward parts are grouped by their number of experts, since that decides
which routers are distinct and how many multisets of sizes there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations_with_replacement, product
from math import comb, prod
from random import Random
from typing import TypeVar

from moesaic.search_spaces.architecture import Architecture, Slot, Stack
from moesaic.search_spaces.parts import Attention, Backbone, CrossAttention, FeedForward, Layer, Router

T = TypeVar("T")


@dataclass(frozen=True)
class FeedForwardGroup:
    """All feed-forward parts with one number of experts: any multiset of ``sizes``, or where they are ``equal`` one for
    all experts; a shared size, a router. With no experts there is one, whatever the sizes."""

    experts: int
    sizes: tuple[int, ...]
    shared_sizes: tuple[int, ...]
    routers: tuple[Router | None, ...]
    equal: bool = False

    @property
    def chosen(self) -> int:
        """How many sizes are chosen."""
        return min(self.experts, 1) if self.equal else self.experts

    def expert_sizes(self, chosen: tuple[int, ...]) -> tuple[int, ...]:
        """Those of all experts, from the chosen ones."""
        return chosen * self.experts if self.equal else chosen

    @cached_property
    def multisets(self) -> int:
        """Number of distinct choices of sizes (stars and bars)."""
        return comb(len(self.sizes) + self.chosen - 1, self.chosen)

    @cached_property
    def count(self) -> int:
        """Number of distinct parts: multisets of sizes, times shared sizes, times routers."""
        return self.multisets * len(self.shared_sizes) * len(self.routers)

    @property
    def raw_count(self) -> int:
        """The same with the order of experts told apart."""
        return len(self.sizes) ** self.chosen * len(self.shared_sizes) * len(self.routers)

    def sample(self, rng: Random) -> FeedForward:
        """Uniform over the distinct parts: a multiset is drawn as the gaps of a uniform combination."""
        bars = sorted(rng.sample(range(len(self.sizes) + self.chosen - 1), self.chosen))
        sizes = tuple(self.sizes[bar - position] for position, bar in enumerate(bars))
        return FeedForward(self.expert_sizes(sizes), rng.choice(self.routers), rng.choice(self.shared_sizes))

    def __iter__(self) -> Iterator[FeedForward]:
        for sizes in combinations_with_replacement(self.sizes, self.chosen):
            for shared in self.shared_sizes:
                for router in self.routers:
                    yield FeedForward(self.expert_sizes(sizes), router, shared)


@dataclass(frozen=True)
class LayerSpace:
    """Choices of one layer. ``groups`` are sorted by number of experts; sizes and heads are sorted too. ``crosses`` are
    those of cross-attention; None: there is none.

    ``bank``: the layer of the trained model whose slices the choices are; else the envelope is made to hold them all.
    """

    attentions: tuple[Attention, ...]
    groups: tuple[FeedForwardGroup, ...]
    bank: FeedForward | None = None
    crosses: tuple[CrossAttention | None, ...] = (None,)

    @cached_property
    def count(self) -> int:
        return len(self.attentions) * len(self.crosses) * sum(group.count for group in self.groups)

    @cached_property
    def raw_count(self) -> int:
        return len(self.attentions) * len(self.crosses) * sum(group.raw_count for group in self.groups)

    @cached_property
    def smallest(self) -> Layer:
        """The layer with the fewest active, then stored, neurons."""
        return _smallest_layer(self)

    def sample_cross(self, rng: Random) -> CrossAttention | None:
        """Nothing is drawn where there is no choice, so that spaces without an encoder draw what they drew before."""
        first, *others = self.crosses
        return rng.choice(self.crosses) if others else first

    def group(self, experts: int) -> FeedForwardGroup | None:
        return next((group for group in self.groups if group.experts == experts), None)

    def why_not(self, layer: Layer) -> tuple[str, object, object] | None:
        """(key, found, allowed) of the first choice that this layer space lacks."""
        if layer.attention not in self.attentions:
            allowed = [f"{a.heads}/{a.kv_heads}" for a in self.attentions]
            return "attention", f"{layer.attention.heads}/{layer.attention.kv_heads}", allowed
        if layer.cross not in self.crosses:
            return "cross", layer.cross, list(self.crosses)
        return self._why_no_part(layer.feed_forward)

    def _why_no_part(self, part: FeedForward) -> tuple[str, object, object] | None:
        group = self.group(part.experts)
        if group is None:
            return "feed_forward.expert_sizes", f"{part.experts} experts", [g.experts for g in self.groups]
        if wrong := [size for size in part.expert_sizes if size not in group.sizes]:
            return "feed_forward.expert_sizes", wrong[0], list(group.sizes)
        if group.equal and len(set(part.expert_sizes)) > 1:
            return "feed_forward.expert_sizes", list(part.expert_sizes), "experts of one size"
        if part.shared_size not in group.shared_sizes:
            return "feed_forward.shared_size", part.shared_size, list(group.shared_sizes)
        if part.router not in group.routers:
            return "feed_forward.router", str(part.router), [str(r) for r in group.routers]
        return None


@dataclass(frozen=True)
class StackSpace:
    """Every stack with one of ``widths``, one of ``depths`` and layer l out of ``layers[l]``."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    layers: tuple[LayerSpace, ...]
    causal: bool = True

    @cached_property
    def count(self) -> int:
        """Number of distinct stacks."""
        return len(self.widths) * sum(self._depth_counts)

    @cached_property
    def raw_count(self) -> int:
        """The same with the order of experts told apart."""
        counts = [layer.raw_count for layer in self.layers]
        return len(self.widths) * sum(prod(counts[:depth]) for depth in self.depths)

    @cached_property
    def _depth_counts(self) -> list[int]:
        counts = [layer.count for layer in self.layers]
        return [prod(counts[:depth]) for depth in self.depths]

    def build(self, width: int, layers: tuple[Layer, ...]) -> Stack:
        return Stack(width, layers, self.causal)

    def sample(self, rng: Random) -> Stack:
        """Uniform over all distinct stacks, nearly all of which are deep and have many experts."""
        depth = _weighted(rng, self.depths, self._depth_counts)
        layers = tuple(_sample_uniform(space, rng) for space in self.layers[:depth])
        return self.build(rng.choice(self.widths), layers)

    def sample_balanced(self, rng: Random) -> Stack:
        """Uniform over each choice in turn: depth, attentions, number of experts, multiset, router, width."""
        depth = rng.choice(self.depths)
        layers = tuple(_sample_balanced(space, rng) for space in self.layers[:depth])
        return self.build(rng.choice(self.widths), layers)

    def why_not(self, stack: Stack) -> tuple[str, object, object] | None:
        """(key, found, allowed) of the first choice that this space lacks."""
        if stack.causal != self.causal:
            return "causal", stack.causal, self.causal
        if stack.width not in self.widths:
            return "width", stack.width, list(self.widths)
        if len(stack.layers) not in self.depths:
            return "layers", f"{len(stack.layers)} layers", list(self.depths)
        for index, (layer, space) in enumerate(zip(stack.layers, self.layers, strict=False)):
            if reason := space.why_not(layer):
                return f"layers.{index}.{reason[0]}", reason[1], reason[2]
        return None

    @cached_property
    def largest(self) -> Stack:
        return self.build(self.widths[-1], tuple(_largest_layer(space) for space in self.layers[: self.depths[-1]]))

    @cached_property
    def smallest(self) -> Stack:
        return self.build(self.widths[0], tuple(space.smallest for space in self.layers[: self.depths[0]]))

    @cached_property
    def envelope(self) -> Stack:
        return self.build(self.widths[-1], tuple(_envelope_layer(space) for space in self.layers[: self.depths[-1]]))

    def __iter__(self) -> Iterator[Stack]:
        for width in self.widths:
            for depth in self.depths:
                for layers in _layer_tuples(self.layers[:depth]):
                    yield self.build(width, layers)


@dataclass(frozen=True)
class SearchSpace:
    """Every architecture on one backbone, each of whose stacks is one of a ``StackSpace``.

    ``source``: the trained model whose slices the members are, itself one of them; relative budgets are shares of it.
    """

    name: str
    backbone: Backbone
    decoder: StackSpace
    encoder: StackSpace | None = None
    source: Architecture | None = field(default=None, kw_only=True)

    @cached_property
    def stacks(self) -> dict[str, StackSpace]:
        """The spaces of the stacks by name, in the order of ``Architecture.stacks``."""
        return {"decoder": self.decoder} if self.encoder is None else {"encoder": self.encoder, "decoder": self.decoder}

    @cached_property
    def layers(self) -> dict[Slot, LayerSpace]:
        """The choices at every possible address."""
        return {
            Slot(name, index): layer for name, stack in self.stacks.items() for index, layer in enumerate(stack.layers)
        }

    @property
    def depth(self) -> int:
        """Layers of the deepest member."""
        return sum(stack.depths[-1] for stack in self.stacks.values())

    @cached_property
    def cardinality(self) -> int:
        """Number of distinct architectures (up to the order of a layer's experts)."""
        return prod(stack.count for stack in self.stacks.values())

    @cached_property
    def raw_cardinality(self) -> int:
        """The same with ordered experts, as in encodings that store a size per expert."""
        return prod(stack.raw_count for stack in self.stacks.values())

    def build(self, stacks: Mapping[str, Stack]) -> Architecture:
        """The architecture of these stacks, by name."""
        return Architecture(**stacks, backbone=self.backbone)

    def sample(self, rng: Random) -> Architecture:
        """One architecture, uniform over all distinct ones."""
        return self.build({name: stack.sample(rng) for name, stack in self.stacks.items()})

    def sample_balanced(self, rng: Random) -> Architecture:
        """One architecture, uniform over each choice in turn.

        Few experts and shallow networks are as likely as many and deep ones. A search starts from such samples.
        """
        return self.build({name: stack.sample_balanced(rng) for name, stack in self.stacks.items()})

    def __contains__(self, architecture: object) -> bool:
        return isinstance(architecture, Architecture) and self.why_not(architecture) is None

    def why_not(self, architecture: Architecture) -> tuple[str, object, object] | None:
        """(key, found, allowed) of the first choice that this space lacks; None for a member."""
        if architecture.backbone != self.backbone:
            return "backbone", architecture.backbone, self.backbone
        if architecture.stacks.keys() != self.stacks.keys():
            return "stacks", list(architecture.stacks), list(self.stacks)
        for name, stack in architecture.stacks.items():
            if reason := self.stacks[name].why_not(stack):
                return f"{name}.{reason[0]}", reason[1], reason[2]
        return None

    @cached_property
    def largest(self) -> Architecture:
        """The member with the largest value of every choice."""
        return self.build({name: stack.largest for name, stack in self.stacks.items()})

    @cached_property
    def smallest(self) -> Architecture:
        """The member with the smallest widths and depths and, per layer, the fewest active, then stored, neurons."""
        return self.build({name: stack.smallest for name, stack in self.stacks.items()})

    @cached_property
    def envelope(self) -> Architecture:
        """The smallest architecture whose weights contain every member; it need not be a member itself.

        The bank of a layer has a region per expert, each of the largest expert size. The first region is longer if the
        largest dense layer needs more than all of them.
        """
        return self.build({name: stack.envelope for name, stack in self.stacks.items()})

    def only(self, stack: str, layers: tuple[Layer, ...], widths: Mapping[str, int]) -> Architecture:
        """A network, no member, to price ``layers``, the first ones of ``stack``. Other stacks, and this one behind
        them, have the smallest first layers, as many as cross-attention reads."""
        spans = (cross.span for space in self.decoder.layers for cross in space.crosses if cross)
        least = {"decoder": 1, "encoder": max(spans, default=1)}
        stacks = {}
        for name, space in self.stacks.items():
            own = layers if name == stack else ()
            fill = least[name] - (name == stack)
            stacks[name] = space.build(widths[name], own + (space.layers[0].smallest,) * fill)
        return self.build(stacks)

    def __iter__(self) -> Iterator[Architecture]:
        """Every member once. For small spaces only: check ``cardinality`` first."""
        yield from map(self.build, _choices(list(self.stacks.items())))


def distinct_routers(routers: list[Router], experts: int) -> tuple[Router | None, ...]:
    """The distinct routers of a layer of ``experts`` experts; a dense layer has none."""
    if experts == 1:
        return (None,)
    usable = (router for router in routers if router.kind == "threshold" or router.max_experts <= experts)
    return tuple(dict.fromkeys(router.for_experts(experts) for router in usable))


def _sample_uniform(space: LayerSpace, rng: Random) -> Layer:
    group = _weighted(rng, space.groups, [group.count for group in space.groups])
    return Layer(rng.choice(space.attentions), group.sample(rng), space.sample_cross(rng))


def _sample_balanced(space: LayerSpace, rng: Random) -> Layer:
    return Layer(rng.choice(space.attentions), rng.choice(space.groups).sample(rng), space.sample_cross(rng))


def _weighted(rng: Random, items: tuple[T, ...], weights: list[int]) -> T:
    """One of ``items`` with integer weights, exactly: these counts exceed the precision of floats."""
    ticket = rng.randrange(sum(weights))
    for item, weight in zip(items, weights, strict=True):
        if ticket < weight:
            return item
        ticket -= weight
    raise AssertionError("unreachable: the ticket is below the sum of the weights")


def _most_compute(router: Router | None) -> tuple[int, float]:
    if router is None:
        return (1, 0.0)
    return router.max_experts, 1.0 if router.kind == "top_k" else router.threshold or 0.0


def _largest_layer(space: LayerSpace) -> Layer:
    candidates = [
        FeedForward((g.sizes[-1],) * g.experts, max(g.routers, key=_most_compute), g.shared_sizes[-1])
        for g in space.groups
    ]
    part = max(candidates, key=lambda f: (f.neurons, f.worst_active_neurons))
    return Layer(max(space.attentions, key=_most_heads), part, max(space.crosses, key=_most_reads))


def _smallest_layer(space: LayerSpace) -> Layer:
    candidates = [
        FeedForward((g.sizes[0],) * g.experts, min(g.routers, key=_most_compute), g.shared_sizes[0])
        for g in space.groups
    ]
    part = min(candidates, key=lambda f: (f.worst_active_neurons, f.neurons))
    return Layer(min(space.attentions, key=_most_heads), part, min(space.crosses, key=_most_reads))


def _most_heads(attention: Attention) -> tuple[int, int]:
    return attention.heads, attention.kv_heads


def _most_reads(cross: CrossAttention | None) -> tuple[int, int, int]:
    return (cross.span, cross.heads, cross.kv_heads) if cross else (0, 0, 0)


def _envelope_heads(attentions: Sequence[Attention | CrossAttention]) -> tuple[int, int]:
    """The most query heads and the most key/value heads may come from different pairs: round up to a multiple."""
    kv_heads = max(attention.kv_heads for attention in attentions)
    return -(-max(attention.heads for attention in attentions) // max(kv_heads, 1)) * kv_heads, kv_heads


def _envelope_cross(crosses: tuple[CrossAttention | None, ...]) -> CrossAttention | None:
    there = [cross for cross in crosses if cross]
    return CrossAttention(*_envelope_heads(there), max(cross.span for cross in there)) if there else None


def _envelope_layer(space: LayerSpace) -> Layer:
    attention = Attention(*_envelope_heads(space.attentions))
    return Layer(attention, _envelope_part(space), _envelope_cross(space.crosses))


def _envelope_part(space: LayerSpace) -> FeedForward:
    if space.bank is not None:
        return space.bank
    dense = space.group(1)
    sparse = space.groups[-1]
    shared = max(group.shared_sizes[-1] for group in space.groups)
    if sparse.experts == 1:
        return FeedForward((sparse.sizes[-1],))
    region = max(group.sizes[-1] for group in space.groups if group.experts > 1)
    extra = max(0, (dense.sizes[-1] if dense else 0) - sparse.experts * region)
    sizes = (region + extra, *(region,) * (sparse.experts - 1))
    return FeedForward(sizes, max(sparse.routers, key=_most_compute), shared)


def _choices(spaces: list[tuple[str, StackSpace]]) -> Iterator[dict[str, Stack]]:
    """All combinations of one stack per space, by name; the last varies fastest. Unlike ``itertools.product``, lazy."""
    if not spaces:
        yield {}
        return
    name, last = spaces[-1]
    for rest in _choices(spaces[:-1]):
        for stack in last:
            yield {**rest, name: stack}


def _layer_tuples(spaces: tuple[LayerSpace, ...]) -> Iterator[tuple[Layer, ...]]:
    if not spaces:
        yield ()
        return
    for rest in _layer_tuples(spaces[:-1]):
        for attention, cross in product(spaces[-1].attentions, spaces[-1].crosses):
            for group in spaces[-1].groups:
                for part in group:
                    yield (*rest, Layer(attention, part, cross))
