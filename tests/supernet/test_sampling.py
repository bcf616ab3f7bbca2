from __future__ import annotations

from collections import Counter

import pytest
from scipy.stats import chisquare

from moesaic.search_spaces import Architecture, SearchSpace, load_space
from moesaic.search_spaces.yaml_source import YamlSource
from moesaic.supernet import SliceSampler
from tests.search_spaces.two_stacks import two_stack_space


def test_a_step_has_one_random_member(preset_space: SearchSpace) -> None:
    sampler = SliceSampler(preset_space, 0)
    for step in range(20):
        (member,) = sampler.slices(step)
        assert member in preset_space


def test_slices_are_a_function_of_seed_and_step(preset_space: SearchSpace) -> None:
    forward = [SliceSampler(preset_space, 3).slices(step) for step in range(10)]
    one = SliceSampler(preset_space, 3)
    assert [one.slices(step) for step in reversed(range(10))] == forward[::-1]
    assert [SliceSampler(preset_space, 4).slices(step) for step in range(10)] != forward
    assert len({tuple(found) for found in forward}) > 5


def test_the_largest_trains_alone_at_first_and_no_card_is_lost(tiny_space) -> None:
    plain, patient = SliceSampler(tiny_space, 0), SliceSampler(tiny_space, 0, largest_first=5)
    assert [patient.slices(step) for step in range(5)] == [[tiny_space.largest]] * 5
    assert [patient.slices(step + 5) for step in range(8)] == [plain.slices(step) for step in range(8)]


def drawn(space: SearchSpace, draws: int, seed: int = 0) -> list[Architecture]:
    sampler = SliceSampler(space, seed)
    return [member for step in range(draws) for member in sampler.slices(step)]


UNEVEN = {
    "width": [16, 32, 48],
    "depth": [1, 3, 4],
    "layer": {
        "heads": [1],
        "kv_heads": [1],
        "experts": [1, 2, 3, 4],
        "expert_sizes": [16, 32],
        "dense_sizes": [16],
        "routers": [{"kind": "top_k", "k": [1, 2]}, {"kind": "threshold", "threshold": [0.6], "max_k": [3]}],
    },
    "layers": {2: {"experts": [1, 3]}},
}


@pytest.mark.parametrize("seed", [0, 1])
def test_fair_sampling_deals_every_choice_equally_often_over_whole_decks(seed: int) -> None:
    """36 draws are whole decks of widths and depths, and of the experts of layers that 3, 2 and 1 of 3 depths have."""
    space = load_space(YamlSource("test", UNEVEN))
    members = drawn(space, 36, seed)
    assert set(Counter(m.decoder.width for m in members).values()) == {36 // 3}
    assert set(Counter(len(m.decoder.layers) for m in members).values()) == {36 // 3}
    for index, layer in enumerate(space.decoder.layers):
        parts = [m.decoder.layers[index].feed_forward for m in members if len(m.decoder.layers) > index]
        deep = sum(depth > index for depth in space.decoder.depths)
        assert len(parts) == 36 * deep // 3
        counts = Counter(part.experts for part in parts)
        assert set(counts) == {group.experts for group in layer.groups}
        assert set(counts.values()) == {len(parts) // len(layer.groups)}


def test_fair_sampling_deals_each_value_once_before_any_comes_again() -> None:
    space = load_space(YamlSource("test", UNEVEN))
    members = drawn(space, 144)
    for index, layer in enumerate(space.decoder.layers):
        parts = [m.decoder.layers[index].feed_forward for m in members if len(m.decoder.layers) > index]
        size = len(layer.groups)
        for first in range(0, len(parts) - size + 1, size):
            assert {p.experts for p in parts[first : first + size]} == {g.experts for g in layer.groups}


def test_fair_sampling_deals_the_routers_of_each_number_of_experts_equally_often() -> None:
    space = load_space(YamlSource("test", UNEVEN))
    members = drawn(space, 3 * 4 * 12)
    for group in space.decoder.layers[0].groups:
        routers = [
            m.decoder.layers[0].feed_forward.router
            for m in members
            if m.decoder.layers[0].feed_forward.experts == group.experts
        ]
        counts = Counter(routers)
        assert set(counts) == set(group.routers)
        assert set(counts.values()) == {len(routers) // len(group.routers)}


def test_choices_are_dealt_independently_of_each_other() -> None:
    """Width and the experts of the first layer have decks of their own: all pairs come up."""
    space = load_space(YamlSource("test", UNEVEN))
    pairs = Counter((m.decoder.width, m.decoder.layers[0].feed_forward.experts) for m in drawn(space, 1200))
    assert len(pairs) == 3 * 4
    assert chisquare(list(pairs.values())).pvalue > 1e-3


def test_experts_of_equal_sizes_are_dealt_as_equal() -> None:
    layer = {"heads": [1], "experts": [1, 3], "dense_sizes": [16], "expert_sizes": [16, 32, 48], "equal_sizes": True,
             "routers": [{"kind": "top_k", "k": [1, 2]}]}  # fmt: skip
    space = load_space(YamlSource("test", {"width": [16], "depth": [1], "layer": layer}))
    members = drawn(space, 120)
    assert all(member in space for member in members)
    assert len({member.decoder.layers[0].feed_forward for member in members}) == 1 + 3 * 2


def test_a_second_stack_has_decks_of_its_own() -> None:
    """240 draws are whole decks of every choice; had both stacks one deck, not all pairs would come up."""
    space = two_stack_space()
    members = drawn(space, 240)
    assert all(member in space for member in members)
    for name, stack in space.stacks.items():
        widths = Counter(member.stacks[name].width for member in members)
        assert widths == dict.fromkeys(stack.widths, 120)
        depths = Counter(len(member.stacks[name].layers) for member in members)
        assert set(depths) == set(stack.depths)
        assert len(set(depths.values())) == 1
        experts = Counter(member.stacks[name].layers[0].feed_forward.experts for member in members)
        assert experts == {1: 120, 2: 120}
    pairs = Counter(tuple(stack.width for stack in member.stacks.values()) for member in members)
    assert len(pairs) == 4
    assert chisquare(list(pairs.values())).pvalue > 1e-3
    firsts = Counter(tuple(s.layers[0].feed_forward.experts for s in member.stacks.values()) for member in members)
    assert len(firsts) == 4
