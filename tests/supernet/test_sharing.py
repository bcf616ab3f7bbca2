from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.search_spaces import FeedForward, Router, SearchSpace
from moesaic.supernet.sharing import expert_layout


@given(seed=st.integers(0, 2**32))
def test_experts_have_their_sizes_and_never_overlap(seed: int, preset_space: SearchSpace, sharing: str) -> None:
    rng = Random(seed)
    for member in (preset_space.sample(rng), preset_space.sample_balanced(rng)):
        for room, layer in zip(preset_space.envelope.decoder.layers, member.decoder.layers, strict=False):
            bank, part = room.feed_forward, layer.feed_forward
            layout = expert_layout(bank, part, sharing)
            assert layout.sizes == part.expert_sizes
            rows = [row for start, size in layout.segments for row in range(start, start + size)]
            assert len(rows) == len(set(rows))
            assert min(rows) >= bank.shared_size  # the rows below belong to the shared expert
            assert max(rows) < bank.neurons


def test_policies_agree_on_the_envelope_which_they_fill(preset_space: SearchSpace) -> None:
    for layer in preset_space.envelope.decoder.layers:
        bank = layer.feed_forward
        nested, packed = (expert_layout(bank, bank, sharing) for sharing in ("nested", "packed"))
        assert nested == packed
        rows = {row for start, size in nested.segments for row in range(start, start + size)}
        assert rows | set(range(bank.shared_size)) == set(range(bank.neurons))


BANK = FeedForward((64, 48, 48, 48), Router("top_k", k=2), 32)


def test_nested_experts_use_the_first_rows_of_fixed_regions() -> None:
    part = FeedForward((48, 32, 16), Router("top_k", k=1))
    assert expert_layout(BANK, part, "nested").segments == ((32, 48), (96, 32), (144, 16))


def test_packed_experts_follow_one_another() -> None:
    part = FeedForward((48, 32, 16), Router("top_k", k=1))
    assert expert_layout(BANK, part, "packed").segments == ((32, 48), (80, 32), (112, 16))


def test_a_dense_layer_uses_the_bank_from_its_first_routed_row(sharing: str) -> None:
    assert expert_layout(BANK, FeedForward((208,)), sharing).segments == ((32, 208),)


def test_a_nested_neuron_always_serves_the_same_expert(tiny_space: SearchSpace) -> None:
    bank = tiny_space.envelope.decoder.layers[0].feed_forward
    owner: dict[int, int] = {}
    group = tiny_space.decoder.layers[0].groups
    for part in (part for g in group if g.experts > 1 for part in g):
        for expert, (start, size) in enumerate(expert_layout(bank, part, "nested").segments):
            for row in range(start, start + size):
                assert owner.setdefault(row, expert) == expert
    assert set(owner.values()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "part",
    [
        FeedForward((16,) * 5, Router("top_k", k=1)),
        FeedForward((80, 16), Router("top_k", k=1)),
        FeedForward((64, 64), Router("top_k", k=1)),
        FeedForward((16, 16), Router("top_k", k=1), 48),
        FeedForward((224,)),
    ],
)
def test_a_bank_that_is_too_small_is_refused(part: FeedForward, sharing: str) -> None:
    with pytest.raises(ValueError, match="exceed the bank"):
        expert_layout(BANK, part, sharing)
