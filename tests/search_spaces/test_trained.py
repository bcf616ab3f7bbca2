"""The space of a trained model: the model is its largest member, and all members fit into its bank."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, MoesaicError, Router
from moesaic.search_spaces.architecture import Stack
from moesaic.search_spaces.moves import neighbours
from moesaic.search_spaces.trained import TrainedSpec, split_bank

shares = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4)
specs = st.builds(
    TrainedSpec,
    expert_sizes=st.lists(st.sampled_from([16, 32, 48, 64, 128]), min_size=1, max_size=3),
    shared=st.lists(st.floats(0, 0.99), min_size=1, max_size=3),
    active=shares,
    threshold=st.lists(st.floats(0.05, 0.95), max_size=2),
    router=st.sampled_from([["mass"], ["mlp"], ["mass", "mlp"]]),
    kept=shares,
    expert_kept=shares,
    prune=st.lists(st.sampled_from(["heads", "layers"]), unique=True),
)
dense = st.integers(1, 40).map(lambda tiles: FeedForward((16 * tiles,)))
mixtures = st.builds(
    lambda experts, tiles, k, shared, weights: FeedForward(
        (16 * tiles,) * experts, Router("top_k", k=min(k, experts), weights=weights), 16 * shared
    ),
    st.integers(2, 12), st.integers(1, 6), st.integers(1, 4), st.integers(0, 3), st.sampled_from(["sum", "softmax"]),
)  # fmt: skip


@st.composite
def sources(draw: st.DrawFn) -> Architecture:
    parts = draw(st.lists(dense | mixtures, min_size=1, max_size=3))
    return Architecture(Stack(32, tuple(Layer(Attention(4, 2), part) for part in parts)), Backbone(head_size=8))


@settings(max_examples=150, deadline=None)
@given(sources(), specs, st.integers(0, 1000))
def test_the_source_is_the_largest_member_and_its_bank_holds_all(
    source: Architecture, spec: TrainedSpec, seed: int
) -> None:
    space = spec.build(source)
    assert space.largest == space.source == source
    assert space.largest in space
    banks = {slot: layer.feed_forward for slot, layer in space.envelope.layers.items()}
    rng = Random(seed)
    for member in (space.smallest, *(space.sample_balanced(rng) for _ in range(5))):
        assert member in space
        for slot, layer in member.layers.items():
            part, whole = layer.feed_forward, source.layers[slot].feed_forward
            attention, trained = layer.attention, source.layers[slot].attention
            assert attention == trained or (attention.kv_heads > 0 and "heads" in spec.prune) or "layers" in spec.prune
            assert attention.kv_heads <= trained.kv_heads
            assert attention.heads * trained.kv_heads == attention.kv_heads * trained.heads  # whole groups
            if not part.experts:
                assert "layers" in spec.prune
                continue
            assert part.neurons <= banks[slot].neurons == whole.neurons
            assert part.worst_active_neurons <= whole.worst_active_neurons or part.router is not None
            if whole.router is None and part.router is not None:
                assert part.neurons == whole.neurons  # the experts and the shared part are all of the layer
                assert part.router.score in spec.router
                assert part.router.weights == "one"
                assert part.router.max_experts < part.experts
            elif whole.router is not None:
                assert part.router is not None
                assert part.router.max_experts <= whole.router.max_experts
                assert (part.router.score, part.router.weights) == (whole.router.score, whole.router.weights)


@settings(max_examples=60, deadline=None)
@given(sources(), specs, st.integers(0, 1000))
def test_moves_stay_in_the_space(source: Architecture, spec: TrainedSpec, seed: int) -> None:
    space = spec.build(source)
    start = space.sample_balanced(Random(seed))
    for number, member in enumerate(neighbours(space, start)):
        assert member in space, space.why_not(member)
        if number > 30:
            break


def test_a_split_bank_is_the_layer_in_the_smallest_experts() -> None:
    bank = split_bank(96)
    assert (bank.expert_sizes, bank.shared_size, bank.neurons) == ((16,) * 6, 0, 96)
    assert bank.router == Router("top_k", k=6, weights="one", score="mass")
    assert split_bank(96, "mlp").router == Router("top_k", k=6, weights="one", score="mlp")


def test_each_layer_chooses_among_the_routers_of_the_space() -> None:
    source = Architecture(Stack(32, (Layer(Attention(2, 2), FeedForward((192,))),)), Backbone(head_size=8))
    (layer,) = TrainedSpec(active=[0.5], shared=[0.0], router=["mass", "mlp"]).build(source).layers.values()
    assert [[router.score for router in group.routers if router] for group in layer.groups] == [
        [],
        *[["mass", "mlp"]] * 2,
    ]
    assert layer.bank == split_bank(192, "mlp")


def test_the_same_number_of_experts_is_one_layout() -> None:
    """Of 192 neurons: 8 of 16 beside 64 shared, and not 4 of 32 beside 64 where 4 of 16 beside 128 exist."""
    part = TrainedSpec(expert_sizes=[16, 32], shared=[1 / 3, 2 / 3]).build(
        Architecture(Stack(32, (Layer(Attention(2, 2), FeedForward((192,))),)), Backbone(head_size=8))
    )
    (layer,) = part.layers.values()
    found = {group.experts: (group.sizes, group.shared_sizes) for group in layer.groups if group.experts > 1}
    assert found == {4: ((16,), (128,)), 8: ((16,), (64,)), 2: ((32,), (128,))}


def test_no_shared_neurons_are_none() -> None:
    source = Architecture(Stack(32, (Layer(Attention(2, 2), FeedForward((192,))),)), Backbone(head_size=8))
    (layer,) = TrainedSpec(expert_sizes=[16, 64], shared=[0.0]).build(source).layers.values()
    assert {group.experts: group.shared_sizes for group in layer.groups} == {1: (0,), 3: (0,), 12: (0,)}


def test_experts_of_different_sizes_are_refused() -> None:
    part = FeedForward((32, 16), Router("top_k", k=1))
    source = Architecture(Stack(32, (Layer(Attention(2, 2), part),)), Backbone(head_size=8))
    with pytest.raises(MoesaicError, match="experts of different sizes cannot be made sparser yet"):
        TrainedSpec().build(source)


@pytest.mark.parametrize(
    "wrong",
    [
        {"active": [0.0]},
        {"kept": []},
        {"expert_sizes": [24]},
        {"shared": [1.0]},
        {"threshold": [1.0]},
        {"widths": [32]},
    ],
)
def test_wrong_shares_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        TrainedSpec(**wrong)
