"""A second stack is one more value: an encoder, made here, goes through everything that a decoder goes through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from random import Random

from moesaic.search_spaces import (
    Architecture,
    SearchSpace,
    Slot,
    Stack,
    StackSpace,
    crossover,
    draw,
    load_space,
    mutate,
    neighbours,
)
from moesaic.search_spaces.yaml_source import YamlSource


@dataclass(frozen=True)
class TwoStacks(Architecture):
    encoder: Stack = field(kw_only=True)

    @cached_property
    def stacks(self) -> dict[str, Stack]:
        return {"encoder": self.encoder, "decoder": self.decoder}


@dataclass(frozen=True)
class TwoStackSpace(SearchSpace):
    encoder: StackSpace

    @cached_property
    def stacks(self) -> dict[str, StackSpace]:
        return {"encoder": self.encoder, "decoder": self.decoder}

    def build(self, stacks: Mapping[str, Stack]) -> Architecture:
        return TwoStacks(**stacks, backbone=self.backbone)


def part(name: str, depth: list[int]) -> StackSpace:
    layer = {"heads": [1, 2], "kv_heads": [1], "experts": [1, 2], "dense_sizes": [32], "expert_sizes": [16, 32],
             "routers": [{"kind": "top_k", "k": [1]}]}  # fmt: skip
    return load_space(YamlSource(name, {"width": [16, 32], "depth": depth, "layer": layer})).decoder


def space() -> TwoStackSpace:
    one = load_space(YamlSource("test", "tiny"))
    return TwoStackSpace("two", one.backbone, part("decoder", [1, 2]), part("encoder", [1]))


def test_members_are_all_pairs_and_each_is_drawn() -> None:
    two, rng = space(), Random(0)
    members = list(two)
    assert len(set(members)) == len(members) == two.cardinality == two.encoder.count * two.decoder.count
    assert two.raw_cardinality == two.encoder.raw_count * two.decoder.raw_count
    assert all(member in two for member in members[::7])
    drawn = {two.sample_balanced(rng) for _ in range(200)} | {two.sample(rng) for _ in range(200)}
    assert drawn <= set(members)
    assert {(len(a.stacks["encoder"].layers), len(a.stacks["decoder"].layers)) for a in drawn} == {(1, 1), (1, 2)}
    for extreme in (two.largest, two.smallest):
        assert extreme in two
    assert list(two.largest.layers) == [Slot("encoder", 0), Slot("decoder", 0), Slot("decoder", 1)] == list(two.layers)


def test_moves_change_one_stack_and_stay_in_the_space() -> None:
    two, rng = space(), Random(1)
    for _ in range(20):
        member = two.sample_balanced(rng)
        found = neighbours(two, member)
        assert found and all(neighbour in two for neighbour in found)
        changed = [{n for n, s in neighbour.stacks.items() if s != member.stacks[n]} for neighbour in found]
        assert all(len(names) == 1 for names in changed)
        assert {name for names in changed for name in names} == {"encoder", "decoder"}
        assert mutate(two, member, rng, steps=3) in two
        other = two.sample_balanced(rng)
        child = crossover(two, member, other, rng)
        assert child in two
        for slot, layer in child.layers.items():
            assert layer in [parent.layers[slot] for parent in (member, other) if slot in parent.layers]


def test_what_does_not_belong_and_the_picture_name_the_stack() -> None:
    two = space()
    wide = TwoStacks(two.smallest.decoder, two.backbone, encoder=Stack(64, two.smallest.decoder.layers))
    reason = two.why_not(wide)
    assert reason is not None
    assert reason[0] == "encoder.width"
    lines = draw(two.largest).split("\n")
    assert lines[0].startswith("encoder width 32, 1 layers, decoder width 32, 2 layers")
    assert [line.split()[0] for line in lines[1:]] == ["encoder.0", "decoder.0", "decoder.1"]


def test_two_networks_that_differ_in_one_stack_have_two_fingerprints() -> None:
    prints = {member.fingerprint for member in space()}
    assert len(prints) == space().cardinality
