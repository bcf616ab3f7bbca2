"""Spaces and moves with two stacks: an encoder is treated as a decoder is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from moesaic.search_spaces import (
    Architecture,
    Attention,
    CrossAttention,
    FeedForward,
    Layer,
    SearchSpace,
    Slot,
    Stack,
    crossover,
    draw,
    mutate,
    neighbours,
)
from tests.search_spaces.two_stacks import two_stack_space

TWO = two_stack_space()
MEMBERS = list(TWO)
ENCODER, FIRST, SECOND = Slot("encoder", 0), Slot("decoder", 0), Slot("decoder", 1)
FOREIGN = Layer(Attention(4, 4), FeedForward((512,)))
READING = replace(FOREIGN, cross=CrossAttention(4, 2))
seeds = st.integers(0, 2**32)
bare_decoder = replace(TWO.decoder, layers=tuple(replace(layer, crosses=(None,)) for layer in TWO.decoder.layers))
alone = {
    name: SearchSpace(name, TWO.backbone, stack)
    for name, stack in (("encoder", TWO.encoder), ("decoder", bare_decoder))
}
"""Each stack as the only one of a space; the decoder without cross-attention."""


def bare(stack: Stack) -> Stack:
    return replace(stack, layers=tuple(replace(layer, cross=None) for layer in stack.layers))


def reading(stack: Stack, like: Stack) -> Stack:
    """``stack`` with the cross-attention of ``like``; further layers repeat the last one's."""
    crosses = [layer.cross for layer in like.layers]
    crosses += crosses[-1:] * len(stack.layers)
    layers = tuple(replace(layer, cross=cross) for layer, cross in zip(stack.layers, crosses, strict=False))
    return replace(stack, layers=layers)


def member(seed: int) -> Architecture:
    return TWO.sample_balanced(Random(seed))


# ---------------------------------------------------------------- members


def test_members_are_all_pairs_of_stacks() -> None:
    assert (TWO.cardinality, TWO.raw_cardinality) == (16 * 144, 20 * 220)
    assert len(MEMBERS) == len(set(MEMBERS)) == TWO.cardinality
    pairs = {(one.stacks["encoder"], one.stacks["decoder"]) for one in MEMBERS}
    assert pairs == set(product(TWO.encoder, TWO.decoder))
    assert all(one in TWO for one in MEMBERS)
    assert len({one.fingerprint for one in MEMBERS}) == TWO.cardinality
    assert TWO.depth == 3


def test_uniform_sampling_draws_both_stacks_uniformly_and_independently() -> None:
    rng = Random(2)
    drawn = Counter(TWO.sample(rng) for _ in range(8 * TWO.cardinality))
    assert set(drawn) <= set(MEMBERS)
    assert chisquare([drawn[one] for one in MEMBERS]).pvalue > 1e-3


def test_balanced_sampling_draws_each_choice_of_each_stack_evenly() -> None:
    rng = Random(3)
    drawn = [TWO.sample_balanced(rng) for _ in range(2000)]
    assert set(drawn) <= set(MEMBERS)
    shapes = Counter((a.encoder.width, a.decoder.width, len(a.decoder.layers)) for a in drawn)
    assert len(shapes) == 8
    assert chisquare(list(shapes.values())).pvalue > 1e-3
    experts = Counter((a.layers[ENCODER].feed_forward.experts, a.layers[FIRST].feed_forward.experts) for a in drawn)
    assert len(experts) == 4
    assert chisquare(list(experts.values())).pvalue > 1e-3


def test_extremes_are_those_of_each_stack() -> None:
    for name in ("largest", "smallest", "envelope"):
        found = getattr(TWO, name)
        assert {stack: bare(part) for stack, part in found.stacks.items()} == {
            stack: getattr(space.decoder, name) for stack, space in alone.items()
        }
        heads = {"smallest": 1}.get(name, 2)
        assert all(layer.cross == CrossAttention(heads, 1) for layer in found.decoder.layers)
    assert TWO.largest in TWO
    assert TWO.smallest in TWO
    assert list(TWO.layers) == list(TWO.largest.layers) == [ENCODER, FIRST, SECOND]


OUTSIDE = {
    "backbone": replace(TWO.smallest, backbone=replace(TWO.backbone, tied=False)),
    "encoder.width": replace(TWO.smallest, encoder=replace(TWO.encoder.smallest, width=16)),  # a decoder's width
    "encoder.causal": replace(TWO.smallest, encoder=replace(TWO.encoder.smallest, causal=True)),
    "encoder.layers": replace(TWO.smallest, encoder=Stack(32, TWO.encoder.smallest.layers * 2, False)),
    "encoder.layers.0.attention": TWO.smallest.with_layers({ENCODER: FOREIGN}),
    "decoder.causal": replace(TWO.smallest, decoder=replace(TWO.decoder.smallest, causal=False)),
    "decoder.layers.1.attention": TWO.largest.with_layers({SECOND: READING}),
    "decoder.layers.0.cross": TWO.largest.with_layers(
        {FIRST: replace(TWO.largest.layers[FIRST], cross=CrossAttention(4, 2))}
    ),
}


@pytest.mark.parametrize("key", OUTSIDE)
def test_a_non_member_is_refused_with_the_stack_and_key_that_differ(key: str) -> None:
    assert OUTSIDE[key] not in TWO
    reason = TWO.why_not(OUTSIDE[key])
    assert reason is not None
    assert reason[0] == key


def test_a_network_of_other_stacks_is_not_a_member() -> None:
    lone = Architecture(bare(TWO.decoder.smallest), TWO.backbone)
    assert lone in alone["decoder"]
    assert TWO.why_not(lone) == ("stacks", ["decoder"], ["encoder", "decoder"])
    assert alone["decoder"].why_not(TWO.smallest) == ("stacks", ["encoder", "decoder"], ["decoder"])


# ---------------------------------------------------------------- values


def test_layers_are_at_the_addresses_of_their_stacks() -> None:
    largest = TWO.largest
    assert [str(slot) for slot in largest.layers] == ["encoder.0", "decoder.0", "decoder.1"]
    assert [largest.width_at(slot) for slot in largest.layers] == [48, 32, 32]
    assert largest.output == largest.stacks["decoder"]
    assert [largest.layers[slot] for slot in (FIRST, SECOND)] == list(largest.decoder.layers)


@given(seed=seeds, slots=st.sets(st.sampled_from([ENCODER, FIRST, SECOND])))
def test_with_layers_changes_only_those_addresses(seed: int, slots: set[Slot]) -> None:
    before = member(seed)
    foreign = {slot: FOREIGN if slot == ENCODER else READING for slot in slots}
    changed = before.with_layers(foreign)
    assert changed.layers == {slot: foreign.get(slot, layer) for slot, layer in before.layers.items()}
    for name, stack in changed.stacks.items():
        old = before.stacks[name]
        assert (stack.width, stack.causal, len(stack.layers)) == (old.width, old.causal, len(old.layers))
    assert changed.backbone == before.backbone


def test_a_written_network_names_its_stacks() -> None:
    plain = json.loads(json.dumps(TWO.largest.to_dict()))
    assert list(plain) == ["format", "encoder", "decoder", "backbone"]
    assert Architecture.from_dict(plain) == TWO.largest
    data = {"format": 2, "decoder": plain["encoder"], "backbone": plain["backbone"]}
    assert Architecture.from_dict(data).decoder == TWO.largest.encoder
    assert plain["decoder"]["layers"][0]["cross"] == {"heads": 2, "kv_heads": 1, "span": 1}


def test_the_picture_names_the_stacks() -> None:
    lines = draw(TWO.largest).split("\n")
    assert lines[0].startswith("encoder width 48, 1 layers, decoder width 32, 2 layers, swiglu, ")
    assert [line.split()[0] for line in lines[1:]] == ["encoder.0", "decoder.0", "decoder.1"]


# ---------------------------------------------------------------- moves


@given(seed=seeds)
def test_neighbours_are_those_of_one_stack_beside_the_other(seed: int) -> None:
    """What the moves give for each stack as the only one of a space, and nothing else."""
    before = member(seed)
    encoders, decoders = (
        [found.decoder for found in neighbours(alone[name], Architecture(bare(before.stacks[name]), TWO.backbone))]
        for name in ("encoder", "decoder")
    )
    expected = {replace(before, encoder=found) for found in encoders}
    expected |= {replace(before, decoder=reading(found, before.decoder)) for found in decoders}
    for slot, layer in before.layers.items():
        others = {CrossAttention(1, 1), CrossAttention(2, 1)} - {layer.cross} if layer.cross else set()
        expected |= {before.with_layers({slot: replace(layer, cross=cross)}) for cross in others}
    found = neighbours(TWO, before)
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert all(one in TWO for one in found)


@given(seed=seeds)
def test_a_mutation_is_a_neighbour(seed: int) -> None:
    before, rng = member(seed), Random(seed)
    assert mutate(TWO, before, rng) in neighbours(TWO, before)
    assert mutate(TWO, before, rng, steps=3) in TWO


def test_mutations_reach_every_neighbour() -> None:
    rng, before = Random(0), TWO.largest
    assert {mutate(TWO, before, rng) for _ in range(500)} == set(neighbours(TWO, before))


@given(seed=seeds)
def test_a_child_takes_each_stack_from_its_parents(seed: int) -> None:
    rng = Random(seed)
    parents = member(seed), member(seed + 1)
    child = crossover(TWO, *parents, rng)
    assert child in TWO
    for name, stack in child.stacks.items():
        assert stack.width in {parent.stacks[name].width for parent in parents}
        assert len(stack.layers) in {len(parent.stacks[name].layers) for parent in parents}
    for slot, layer in child.layers.items():
        assert layer in [parent.layers[slot] for parent in parents if slot in parent.layers]


def test_children_mix_the_stacks_of_their_parents() -> None:
    rng, first, second = Random(0), TWO.smallest, TWO.largest
    children = {crossover(TWO, first, second, rng) for _ in range(300)}
    assert {first, second} <= children
    assert replace(first, encoder=second.encoder) in children
    assert replace(second, encoder=first.encoder) in children
