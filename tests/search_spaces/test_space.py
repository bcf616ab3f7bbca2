from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement, product
from math import prod
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from moesaic.search_spaces import (
    Architecture,
    Attention,
    Backbone,
    FeedForward,
    Layer,
    Router,
    SearchSpace,
    Stack,
    StackSpace,
    load_space,
)
from moesaic.search_spaces.yaml_source import YamlSource

seeds = st.integers(0, 2**32)


# ---------------------------------------------------------------- counting


def spelt_routers(layer: dict[str, Any], experts: int) -> set[tuple]:
    """What a token may do, told apart by meaning: the routers of a YAML layer on ``experts`` experts."""
    if experts == 1:
        return {("dense",)}
    found: set[tuple] = set()
    for spec in layer["routers"]:
        for k in spec.get("k", ()):
            if k <= experts:
                found.add(("top", k))
        for threshold, max_k in product(spec.get("threshold", ()), spec.get("max_k", ())):
            # The mass ahead of the j-th most probable expert is (j - 1) / E or more, so no other j is ever kept.
            kept = max(j for j in range(1, experts + 1) if (j - 1) / experts < threshold)
            most = min(max_k, kept)
            found.add(("top", 1) if most == 1 else ("mass", threshold, most))
    return found


def ordered_layers(layer: dict[str, Any]) -> list[tuple]:
    """Every layer of a YAML layer by brute force, the order of experts told apart."""
    return [
        (heads, kv, sizes, shared, router)
        for heads in layer["heads"]
        for kv in layer["kv_heads"]
        if heads % kv == 0
        for experts in layer["experts"]
        for sizes in product(layer["dense_sizes"] if experts == 1 else layer["expert_sizes"], repeat=experts)
        if len(set(sizes)) == 1 or not layer.get("equal_sizes")
        for shared in ([0] if experts == 1 else layer.get("shared_sizes", [0]))
        for router in spelt_routers(layer, experts)
    ]


def ordered_networks(data: dict[str, Any]) -> list[tuple]:
    layers = [ordered_layers({**data["layer"], **data.get("layers", {}).get(i, {})}) for i in range(max(data["depth"]))]
    return [
        (width, *network) for width in data["width"] for depth in data["depth"] for network in product(*layers[:depth])
    ]


def test_cardinality_is_the_number_of_distinct_members(small) -> None:
    members = list(small.space)
    assert small.space.cardinality == len(members) == len(set(members)) == small.members
    assert len({member.fingerprint for member in members}) == small.members


def test_raw_cardinality_is_the_number_of_ordered_descriptions(small) -> None:
    networks = ordered_networks(small.data)
    assert small.space.raw_cardinality == len(networks) == len(set(networks)) == small.raw


def test_listing_is_every_description_up_to_the_order_of_experts(small) -> None:
    def unordered(network: tuple) -> tuple:
        width, *layers = network
        return (width, *((h, kv, tuple(sorted(sizes)), shared, router) for h, kv, sizes, shared, router in layers))

    def spelt(member: Architecture) -> tuple:
        layers = []
        for layer in member.decoder.layers:
            part, router = layer.feed_forward, layer.feed_forward.router
            name: tuple = ("dense",)
            if router:
                name = ("top", router.k) if router.kind == "top_k" else ("mass", router.threshold, router.max_k)
            sizes = tuple(sorted(part.expert_sizes))
            layers.append((layer.attention.heads, layer.attention.kv_heads, sizes, part.shared_size, name))
        return (member.decoder.width, *layers)

    assert {spelt(member) for member in small.space} == {unordered(n) for n in ordered_networks(small.data)}


def test_cardinality_of_a_large_space_is_exact(preset_space: SearchSpace) -> None:
    """Beyond 2**53 a float would round: count again with the multisets of each layer listed one by one."""
    layers = []
    for layer in preset_space.layers.values():
        parts = sum(
            sum(1 for _ in combinations_with_replacement(group.sizes, group.experts))
            * len(set(group.shared_sizes))
            * len(set(group.routers))
            for group in layer.groups
        )
        layers.append(parts * len(set(layer.attentions)))
    expected = sum(prod(layers[:depth]) for depth in preset_space.decoder.depths) * len(preset_space.decoder.widths)
    assert preset_space.cardinality == expected
    assert preset_space.raw_cardinality > preset_space.cardinality


# ---------------------------------------------------------------- sampling


def test_sample_is_uniform_over_distinct_architectures(small) -> None:
    space, rng = small.space, Random(7)
    drawn = Counter(space.sample(rng) for _ in range(40 * small.members))
    assert set(drawn) == set(space)
    assert chisquare([drawn[member] for member in space]).pvalue > 1e-3


def test_sample_balanced_draws_numbers_of_experts_evenly_and_multisets_without_bias(sparse_space: SearchSpace) -> None:
    rng = Random(3)
    parts = Counter(sparse_space.sample_balanced(rng).decoder.layers[0].feed_forward for _ in range(6000))
    assert set(parts) == {member.decoder.layers[0].feed_forward for member in sparse_space}
    by_experts = {n: {p: c for p, c in parts.items() if p.experts == n} for n in (1, 2, 3)}
    assert chisquare([sum(found.values()) for found in by_experts.values()]).pvalue > 1e-3
    for found in by_experts.values():
        assert chisquare(list(found.values())).pvalue > 1e-3
    # A draw of each expert's size on its own would give (32, 16) twice as often as (32, 32).
    pairs = by_experts[2]
    mixed = sum(count for part, count in pairs.items() if part.expert_sizes == (32, 16))
    assert abs(mixed / sum(pairs.values()) - 1 / 3) < 0.05


def test_sample_balanced_draws_depths_evenly(small) -> None:
    rng = Random(5)
    drawn = Counter(len(small.space.sample_balanced(rng).decoder.layers) for _ in range(1000))
    assert set(drawn) == set(small.space.decoder.depths)
    assert len(drawn) == 1 or chisquare(list(drawn.values())).pvalue > 1e-3


@given(seed=seeds)
def test_every_sample_is_a_member(seed: int, preset_space: SearchSpace) -> None:
    rng = Random(seed)
    for member in (preset_space.sample(rng), preset_space.sample_balanced(rng)):
        assert member in preset_space
        assert preset_space.why_not(member) is None


@given(seed=seeds)
def test_a_sample_is_a_function_of_the_generator(seed: int, preset_space: SearchSpace) -> None:
    assert preset_space.sample(Random(seed)) == preset_space.sample(Random(seed))
    assert preset_space.sample_balanced(Random(seed)) == preset_space.sample_balanced(Random(seed))


# ---------------------------------------------------------------- membership


def test_listed_members_belong(small_space: SearchSpace) -> None:
    assert all(member in small_space for member in small_space)


def sparse_member() -> Architecture:
    part = FeedForward((32, 16), Router("top_k", k=2), 16)
    return Architecture(Stack(32, (Layer(Attention(2, 1), part),)))


def outside(**changes: Any) -> Architecture:
    """``sparse_member`` with one thing changed."""
    member = sparse_member()
    layer = member.decoder.layers[0]
    part = replace(layer.feed_forward, **changes.pop("part", {}))
    layer = replace(layer, feed_forward=part, **{k: v for k, v in changes.items() if k == "attention"})
    stack = Stack(changes.get("width", 32), (layer,) * changes.get("depth", 1))
    return Architecture(stack, changes.get("backbone", member.backbone))


OUTSIDE = {
    "backbone": outside(backbone=Backbone(activation="relu")),
    "decoder.width": outside(width=48),
    "decoder.layers": outside(depth=2),
    "decoder.layers.0.attention": outside(attention=Attention(4, 1)),
    "decoder.layers.0.feed_forward.expert_sizes": outside(part={"expert_sizes": (48, 16)}),
    "decoder.layers.0.feed_forward.shared_size": outside(part={"shared_size": 32}),
    "decoder.layers.0.feed_forward.router": outside(part={"router": Router("threshold", threshold=0.6, max_k=2)}),
}


@pytest.mark.parametrize("key", OUTSIDE)
def test_a_non_member_is_refused_with_the_key_that_differs(key: str, sparse_space: SearchSpace) -> None:
    assert sparse_member() in sparse_space
    assert OUTSIDE[key] not in sparse_space
    reason = sparse_space.why_not(OUTSIDE[key])
    assert reason is not None
    assert reason[0] == key


def test_a_wrong_number_of_experts_is_refused_with_the_allowed_ones(sparse_space: SearchSpace) -> None:
    reason = sparse_space.why_not(outside(part={"expert_sizes": (16,) * 4}))
    assert reason == ("decoder.layers.0.feed_forward.expert_sizes", "4 experts", [1, 2, 3])


def test_only_architectures_are_members(sparse_space: SearchSpace) -> None:
    assert "small" not in sparse_space
    assert sparse_member().to_dict() not in sparse_space


def test_per_layer_overrides_hold_only_at_their_position() -> None:
    space = _overrides()
    dense, sparse = FeedForward((32,)), FeedForward((16, 16), Router("top_k", k=1))
    wide = FeedForward((48, 48), Router("top_k", k=1), 16)

    def network(*parts: FeedForward) -> Architecture:
        return Architecture(Stack(16, tuple(Layer(Attention(1, 1), part) for part in parts)))

    assert network(sparse, dense, wide) in space
    assert network(sparse, sparse, wide) not in space
    assert network(wide, dense, wide) not in space
    assert network(sparse, dense, sparse) not in space


def _overrides() -> SearchSpace:
    layer = {
        "heads": [1],
        "kv_heads": [1],
        "experts": [1, 2],
        "expert_sizes": [16],
        "dense_sizes": [32],
        "routers": [{"kind": "top_k", "k": [1]}],
    }
    layers = {1: {"experts": [1]}, 2: {"expert_sizes": [48], "shared_sizes": [0, 16]}}
    return load_space(YamlSource("test", {"width": [16], "depth": [1, 3], "layer": layer, "layers": layers}))


# ---------------------------------------------------------------- extremes and envelope


def test_no_member_is_larger_than_the_largest(small_space: SearchSpace) -> None:
    largest = small_space.largest
    assert largest in small_space
    for member in small_space:
        assert member.decoder.width <= largest.decoder.width
        assert len(member.decoder.layers) <= len(largest.decoder.layers)
        for mine, top in zip(member.decoder.layers, largest.decoder.layers, strict=False):
            assert mine.attention.heads <= top.attention.heads
            assert mine.feed_forward.neurons <= top.feed_forward.neurons
            if mine.attention.heads == top.attention.heads:
                assert mine.attention.kv_heads <= top.attention.kv_heads
            if mine.feed_forward.neurons == top.feed_forward.neurons:
                assert mine.feed_forward.worst_active_neurons <= top.feed_forward.worst_active_neurons


def test_no_member_is_smaller_than_the_smallest(small_space: SearchSpace) -> None:
    smallest = small_space.smallest
    assert smallest in small_space
    for member in small_space:
        assert member.decoder.width >= smallest.decoder.width
        assert len(member.decoder.layers) >= len(smallest.decoder.layers)
        for mine, low in zip(member.decoder.layers, smallest.decoder.layers, strict=False):
            assert (mine.attention.heads, mine.attention.kv_heads) >= (low.attention.heads, low.attention.kv_heads)
            assert mine.feed_forward.worst_active_neurons >= low.feed_forward.worst_active_neurons
            if mine.feed_forward.worst_active_neurons == low.feed_forward.worst_active_neurons:
                assert mine.feed_forward.neurons >= low.feed_forward.neurons


def holds(envelope: Architecture, member: Architecture) -> bool:
    """Whether the weights of ``envelope`` have a place for each part of ``member``."""
    if member.decoder.width > envelope.decoder.width or len(member.decoder.layers) > len(envelope.decoder.layers):
        return False
    for room, layer in zip(envelope.decoder.layers, member.decoder.layers, strict=False):
        owners, part = room.feed_forward, layer.feed_forward
        if layer.attention.heads > room.attention.heads or layer.attention.kv_heads > room.attention.kv_heads:
            return False
        if part.experts == 1:
            if part.neurons > sum(owners.expert_sizes):
                return False
            continue
        if part.experts > owners.experts or part.shared_size > owners.shared_size:
            return False
        if any(size > region for size, region in zip(part.expert_sizes, owners.expert_sizes, strict=False)):
            return False
    return True


def test_envelope_holds_every_member(small_space: SearchSpace) -> None:
    assert all(holds(small_space.envelope, member) for member in small_space)


@given(seed=seeds)
def test_envelope_of_a_preset_holds_its_members(seed: int, preset_space: SearchSpace) -> None:
    rng = Random(seed)
    for member in (preset_space.sample(rng), preset_space.sample_balanced(rng)):
        assert holds(preset_space.envelope, member)
    assert holds(preset_space.envelope, preset_space.largest)
    assert holds(preset_space.envelope, preset_space.smallest)


def test_envelope_is_no_larger_than_it_must_be(small_space: SearchSpace) -> None:
    """Per layer, some member needs the bank's first region or the dense layer needs the whole of it."""
    envelope, members = small_space.envelope, list(small_space)
    assert envelope.decoder.width == max(m.decoder.width for m in members)
    assert len(envelope.decoder.layers) == max(len(m.decoder.layers) for m in members)
    for index, room in enumerate(envelope.decoder.layers):
        parts = [m.decoder.layers[index].feed_forward for m in members if len(m.decoder.layers) > index]
        sparse = max((sum(p.expert_sizes) for p in parts if p.experts > 1), default=0)
        dense = max((p.neurons for p in parts if p.experts == 1), default=0)
        assert sum(room.feed_forward.expert_sizes) == max(sparse, dense)
        assert room.feed_forward.shared_size == max(p.shared_size for p in parts)
        assert room.feed_forward.experts == max(p.experts for p in parts)


def test_envelope_has_whole_groups_of_heads_where_the_largest_pairs_do_not_fit_together() -> None:
    layer = _overrides().decoder.layers[0]
    uneven = replace(layer, attentions=(Attention(4, 4), Attention(6, 3)))
    space = SearchSpace("uneven", Backbone(), StackSpace((16,), (1,), (uneven,)))
    attention = space.envelope.decoder.layers[0].attention
    assert attention.heads >= 6
    assert attention.kv_heads >= 4
    assert all(holds(space.envelope, member) for member in space)


def test_a_long_dense_layer_fits_into_the_bank_of_few_small_experts() -> None:
    layer = _overrides().decoder.layers[0]
    groups = tuple(replace(g, sizes=(16, 512)) if g.experts == 1 else g for g in layer.groups)
    space = SearchSpace("long", Backbone(), StackSpace((16,), (1,), (replace(layer, groups=groups),)))
    assert space.envelope.decoder.layers[0].feed_forward.expert_sizes == (512 - 16, 16)
    assert all(holds(space.envelope, member) for member in space)
