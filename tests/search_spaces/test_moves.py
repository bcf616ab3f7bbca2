from __future__ import annotations

from collections import Counter, deque
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from moesaic.search_spaces import (
    Architecture,
    Attention,
    FeedForward,
    Layer,
    Router,
    SearchSpace,
    Stack,
    crossover,
    load_space,
    mutate,
    neighbours,
)
from moesaic.search_spaces.space import LayerSpace
from moesaic.search_spaces.yaml_source import YamlSource

seeds = st.integers(0, 2**32)


def beside(values: tuple[int, ...], one: int, other: int) -> bool:
    return abs(values.index(one) - values.index(other)) == 1


def one_size_apart(sizes: tuple[int, ...], one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one expert of one multiset, and nothing else, has the next size in the other; of equal experts, all."""
    gone, come = Counter(one) - Counter(other), Counter(other) - Counter(one)
    return gone.total() == come.total() == 1 and beside(sizes, next(iter(gone)), next(iter(come)))


def one_choice_apart(space: LayerSpace, one: Layer, other: Layer) -> bool:
    """Whether two layers with the same number of experts differ by one step of one choice."""
    a, b = one.feed_forward, other.feed_forward
    differ = [one.attention != other.attention, a.router != b.router, a.shared_size != b.shared_size]
    differ.append(a.expert_sizes != b.expert_sizes)
    if sum(differ) != 1:
        return False
    group = space.group(a.experts)
    assert group is not None
    mine, other = ((sizes[:1] if group.equal else sizes) for sizes in (a.expert_sizes, b.expert_sizes))
    return mine == other or one_size_apart(group.sizes, mine, other)


def is_one_step(space: SearchSpace, a: Architecture, b: Architecture) -> bool:
    """The definition of a neighbour, told from two architectures alone."""
    if a.decoder.width != b.decoder.width:
        return a.decoder.layers == b.decoder.layers and beside(space.decoder.widths, a.decoder.width, b.decoder.width)
    mine, other = a.decoder.layers, b.decoder.layers
    if len(mine) != len(other):
        shared = min(len(mine), len(other))
        return mine[:shared] == other[:shared] and beside(space.decoder.depths, len(mine), len(other))
    changed = [i for i in range(len(mine)) if mine[i] != other[i]]
    if len(changed) != 1:
        return False
    one, two, layer = mine[changed[0]], other[changed[0]], space.decoder.layers[changed[0]]
    counts = tuple(group.experts for group in layer.groups)
    if one.feed_forward.experts != two.feed_forward.experts:
        return one.attention == two.attention and beside(counts, one.feed_forward.experts, two.feed_forward.experts)
    return one_choice_apart(layer, one, two)


def test_neighbours_are_members_one_step_away_each_once(small_space: SearchSpace) -> None:
    for member in small_space:
        found = neighbours(small_space, member)
        assert member not in found
        assert len(found) == len(set(found))
        for neighbour in found:
            assert neighbour in small_space
            assert is_one_step(small_space, member, neighbour)


def test_neighbours_miss_no_step_between_layers_of_equal_depth_and_number_of_experts(small_space: SearchSpace) -> None:
    def shape(a: Architecture) -> tuple[int, ...]:
        return tuple(layer.feed_forward.experts for layer in a.decoder.layers)

    members = list(small_space)
    for member in members:
        expected = {m for m in members if shape(m) == shape(member) and is_one_step(small_space, member, m)}
        assert {m for m in neighbours(small_space, member) if shape(m) == shape(member)} == expected


def test_another_expert_may_have_any_size_and_keeps_the_others(sparse_space: SearchSpace) -> None:
    for member in sparse_space:
        part = member.decoder.layers[0].feed_forward
        if part.experts != 2:
            continue
        grown = [n.decoder.layers[0].feed_forward for n in neighbours(sparse_space, member)]
        added = {p.expert_sizes for p in grown if p.experts == 3}
        assert added == {tuple(sorted((*part.expert_sizes, size), reverse=True)) for size in (16, 32)}


def test_experts_of_one_size_are_one_choice() -> None:
    """A layer of 64 equal experts has two moves of sizes, not two per expert, and none is made twice."""
    layer = {"heads": [1], "kv_heads": [1], "experts": [64], "expert_sizes": [16, 32, 48],
             "routers": [{"kind": "top_k", "k": [1]}]}  # fmt: skip
    space = load_space(YamlSource("test", {"width": [16], "depth": [3], "layer": layer}))
    equal = FeedForward((32,) * 64, Router("top_k", k=1))
    middle = space.build({"decoder": Stack(16, (Layer(Attention(1, 1), equal),) * 3)})
    found = neighbours(space, middle)
    assert len(found) == len(set(found)) == 3 * 2
    mixed = FeedForward((48,) * 20 + (32,) * 20 + (16,) * 24, Router("top_k", k=1))
    assert (
        len(neighbours(space, middle.with_layers(dict.fromkeys(middle.layers, Layer(Attention(1, 1), mixed))))) == 3 * 4
    )


@given(seed=seeds)
def test_neighbours_of_a_preset_are_distinct(seed: int, preset_space: SearchSpace) -> None:
    member = preset_space.sample_balanced(Random(seed))
    found = neighbours(preset_space, member)
    assert len(found) == len(set(found))
    assert member not in found


def test_a_mutation_draws_its_kind_then_its_layer_then_its_move_uniformly(sparse_space: SearchSpace) -> None:
    """The law against one worked out here: kinds are told apart by what differs."""

    def kind(one: Architecture, other: Architecture) -> str:
        if one.decoder.width != other.decoder.width:
            return "width"
        a, b = one.decoder.layers[0], other.decoder.layers[0]
        if a.attention != b.attention:
            return "attention"
        if a.feed_forward.experts != b.feed_forward.experts:
            return "experts"
        return next(
            k
            for k in ("expert_sizes", "router", "shared_size")
            if getattr(a.feed_forward, k) != getattr(b.feed_forward, k)
        )

    part = FeedForward((32, 16), Router("top_k", k=2), 16)
    before, rng, draws = sparse_space.build({"decoder": Stack(32, (Layer(Attention(2, 1), part),))}), Random(0), 4000
    found = neighbours(sparse_space, before)  # one layer: a kind, then a move of it
    kinds = Counter(kind(before, other) for other in found)
    assert set(kinds) == {"attention", "experts", "expert_sizes", "router", "shared_size"}
    drawn = Counter(mutate(sparse_space, before, rng) for _ in range(draws))
    expected = [draws / (len(kinds) * kinds[kind(before, other)]) for other in found]
    assert chisquare([drawn[other] for other in found], expected).pvalue > 1e-3


def test_a_mutation_draws_its_layer_uniformly() -> None:
    layer = {"heads": [1], "kv_heads": [1], "experts": [1], "dense_sizes": [16, 32, 48, 64]}
    layers = {0: {"dense_sizes": [16, 32]}, 2: {"dense_sizes": [16]}}
    space = load_space(YamlSource("test", {"width": [16], "depth": [3], "layer": layer, "layers": layers}))
    before, rng = space.smallest, Random(0)
    middle = next(a for a in space if a.decoder.layers[1].feed_forward.expert_sizes == (32,))
    for start in (before, middle):  # the last layer has no move; one of the middle layer has one move, or two
        changed = Counter(
            next(i for i in range(3) if mutated.decoder.layers[i] != start.decoder.layers[i])
            for mutated in (mutate(space, start, rng) for _ in range(1000))
        )
        assert set(changed) == {0, 1}
        assert chisquare(list(changed.values())).pvalue > 1e-3


def test_a_deeper_neighbour_repeats_the_last_layer() -> None:
    space = load_space(YamlSource("test", "tiny"))
    shallow = space.build({"decoder": Stack(32, space.sample(Random(1)).decoder.layers[:1])})
    deeper = [n for n in neighbours(space, shallow) if len(n.decoder.layers) == 2]
    assert [n.decoder.layers for n in deeper] == [shallow.decoder.layers * 2]


def reachable(edges: dict[Architecture, list[Architecture]], start: Architecture) -> set[Architecture]:
    seen, queue = {start}, deque([start])
    while queue:
        for following in edges[queue.popleft()]:
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return seen


def test_every_member_is_reachable_from_every_other(small_space: SearchSpace) -> None:
    members = set(small_space)
    forward = {member: neighbours(small_space, member) for member in members}
    backward: dict[Architecture, list[Architecture]] = {member: [] for member in members}
    for member, following in forward.items():
        for neighbour in following:
            backward[neighbour].append(member)
    start = small_space.smallest
    assert reachable(forward, start) == members
    assert reachable(backward, start) == members


@given(seed=seeds, steps=st.integers(1, 4))
def test_mutations_are_members(seed: int, steps: int, preset_space: SearchSpace) -> None:
    rng = Random(seed)
    assert mutate(preset_space, preset_space.sample_balanced(rng), rng, steps) in preset_space


@given(seed=seeds)
def test_one_mutation_is_one_step(seed: int, preset_space: SearchSpace) -> None:
    rng = Random(seed)
    parent = preset_space.sample_balanced(rng)
    child = mutate(preset_space, parent, rng)
    assert child != parent
    assert is_one_step(preset_space, parent, child)


def test_a_space_of_one_member_mutates_into_itself() -> None:
    layer = {"heads": [1], "kv_heads": [1], "experts": [1], "dense_sizes": [16]}
    space = load_space(YamlSource("test", {"width": [16], "depth": [1], "layer": layer}))
    assert neighbours(space, space.largest) == []
    assert mutate(space, space.largest, Random(0), steps=3) == space.largest


@given(seed=seeds)
def test_a_child_is_a_member_made_of_its_parents(seed: int, preset_space: SearchSpace) -> None:
    rng = Random(seed)
    parents = preset_space.sample_balanced(rng), preset_space.sample_balanced(rng)
    child = crossover(preset_space, *parents, rng)
    assert child in preset_space
    assert child.decoder.width in {p.decoder.width for p in parents}
    assert len(child.decoder.layers) in {len(p.decoder.layers) for p in parents}
    for position, layer in enumerate(child.decoder.layers):
        assert layer in [p.decoder.layers[position] for p in parents if position < len(p.decoder.layers)]


def test_crossover_takes_from_both_parents(small_space: SearchSpace) -> None:
    """Over many draws each parent gives every part that it has."""
    rng = Random(0)
    first, second = small_space.smallest, small_space.largest
    children = {crossover(small_space, first, second, rng) for _ in range(300)}
    assert {first, second} <= children
    assert {c.decoder.width for c in children} == {first.decoder.width, second.decoder.width}
    assert {c.decoder.layers[0] for c in children} == {first.decoder.layers[0], second.decoder.layers[0]}


@given(seed=seeds)
def test_moves_do_not_change_their_arguments(seed: int, preset_space: SearchSpace) -> None:
    rng = Random(seed)
    parents = preset_space.sample_balanced(rng), preset_space.sample_balanced(rng)
    before = [p.to_yaml() for p in parents]
    hashes = [hash(p) for p in parents]
    cardinality = preset_space.cardinality
    mutate(preset_space, parents[0], rng, 2)
    crossover(preset_space, *parents, rng)
    neighbours(preset_space, preset_space.smallest)
    assert [p.to_yaml() for p in parents] == before
    assert [hash(p) for p in parents] == hashes
    assert preset_space.cardinality == cardinality


@pytest.mark.parametrize("move", ["mutate", "crossover"])
def test_moves_are_functions_of_the_generator(move: str, preset_space: SearchSpace) -> None:
    first, second = (preset_space.sample(Random(s)) for s in (1, 2))
    once, again = (
        mutate(preset_space, first, Random(5), 3) if move == "mutate" else crossover(preset_space, first, second, rng)
        for rng in (Random(5), Random(5))
    )
    assert once == again
