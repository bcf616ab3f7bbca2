"""Which backbones are valid, which fields are written, and that every field changes the fingerprint."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.search_spaces import (
    Architecture,
    Attention,
    Backbone,
    CrossAttention,
    FeedForward,
    Layer,
    MoesaicError,
    Router,
    Slot,
    Stack,
    load_space,
)
from moesaic.search_spaces.parts import GATED
from moesaic.search_spaces.yaml_source import YamlSource
from tests.search_spaces.test_architecture import CHANGES, backbones, pinned

# ---------------------------------------------------------------- what is possible

SETTINGS = {
    "head_size": st.integers(-1, 40),
    "activation": st.sampled_from(sorted(GATED)),
    "norm_eps": st.sampled_from([1e-6, 1e-5, 0.0, 1.0, -1e-6, math.nan]),
    "positions": st.sampled_from(["rotary", "learned", "sinusoidal", "none"]),
    "rotary_base": st.sampled_from([10_000.0, 500, 1.5, 1.0, -500.0, math.inf, math.nan]),
    "rotary_fraction": st.sampled_from([1.0, 0.5, 0.25, 0.0, 1.5, -0.5, math.nan]),
    "max_positions": st.sampled_from([None, 1, 64, 0, -1]),
    "biases": st.sampled_from(["none", "qkv", "all"]),
    "head": st.sampled_from(["linear", "masked", "none"]),
    "tied": st.booleans(),
}


def broken_rules(b: dict[str, Any]) -> set[str]:
    """The messages of all rules that these settings break."""
    turned = b["positions"] == "rotary"
    possible = 1 < b["rotary_base"] < math.inf and 0 < b["rotary_fraction"] <= 1
    values = b["head_size"] * Fraction(b["rotary_fraction"]) if possible else Fraction(0)
    gated = b["activation"] in ("swiglu", "geglu", "geglu_tanh")
    rules = {
        "head_size is too small": b["head_size"] < 1,
        "norm_eps must be small": not 0 < b["norm_eps"] < 1,
        "impossible rotary positions": turned and not possible,
        "rotary positions rotate pairs of values": turned and possible and (round(values) % 2 or round(values) == 0),
        "rotary settings without rotary positions": (
            not turned and (b["rotary_base"], b["rotary_fraction"]) != (10_000.0, 1.0)
        ),
        "max_positions is required by learned positions, and only by these": (
            (b["positions"] == "learned") is (b["max_positions"] is None)
        ),
        "max_positions is too small": b["max_positions"] is not None and b["max_positions"] < 1,
        "a gated unit has no biases": b["biases"] == "all" and gated,
        "a masked head has no gate": b["head"] == "masked" and gated,
        "without a head there is no vocabulary layer": b["head"] == "none" and not b["tied"],
    }
    return {message for message, broken in rules.items() if broken}


@settings(max_examples=300)
@given(st.fixed_dictionaries({}, optional=SETTINGS))
def test_a_backbone_is_refused_exactly_where_a_rule_is_broken(given: dict[str, Any]) -> None:
    defaults = {key.name: key.default for key in fields(Backbone)}
    broken = broken_rules(defaults | given)
    if not broken:
        found = Backbone(**given)
        assert {name: getattr(found, name) for name in given} == given
        return
    with pytest.raises(ValueError) as caught:
        Backbone(**given)
    assert str(caught.value).splitlines()[0] in broken


def choices(kind: Any, name: str) -> tuple[str, ...]:
    return get_args(get_type_hints(kind)[name])


@pytest.mark.parametrize("name", ["activation", "norm", "norm_place", "positions", "biases", "head"])
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(name: str) -> None:
    plain = pinned().to_dict()
    plain["backbone"][name] = f"{choices(Backbone, name)[1]}x"
    with pytest.raises(MoesaicError, match="not one of the choices") as caught:
        Architecture.from_dict(plain, "a.yaml")
    assert caught.value.where == f"a.yaml: backbone.{name}"
    assert caught.value.nearest == choices(Backbone, name)[1]
    assert all(choice in str(caught.value.allowed) for choice in choices(Backbone, name))


def test_every_activation_is_gated_or_not() -> None:
    assert set(choices(Backbone, "activation")) == set(GATED)
    for activation, gated in GATED.items():
        backbone = Backbone(activation=activation)
        assert backbone.gated is gated is ("glu" in activation)
        assert backbone.matrices == (3 if gated else 2)


@given(backbones())
def test_what_follows_from_a_backbone(backbone: Backbone) -> None:
    assert backbone.norm_vectors == {"rms": 1, "layer": 2}[backbone.norm]
    turned = Fraction(backbone.rotary_fraction) * backbone.head_size if backbone.positions == "rotary" else 0
    assert backbone.rotary_size == turned


# ---------------------------------------------------------------- what is written


@given(backbones())
def test_only_what_differs_from_its_default_is_written(backbone: Backbone) -> None:
    written = Architecture(pinned().decoder, backbone).to_dict()["backbone"]
    always = {"head_size", "activation"}
    assert set(written) - always == {
        key.name for key in fields(Backbone) if getattr(backbone, key.name) != key.default and key.name not in always
    }
    assert written.keys() >= always
    assert all(getattr(backbone, name) == value for name, value in written.items())


@given(base=st.integers(2, 10**6), fraction=st.sampled_from([1, 1.0]))
def test_equal_numbers_are_one_backbone_with_one_fingerprint(base: int, fraction: float) -> None:
    whole = Architecture(pinned().decoder, Backbone(rotary_base=base, rotary_fraction=fraction))
    written = Architecture(pinned().decoder, Backbone(rotary_base=float(base)))
    assert whole == written == Architecture.from_dict(whole.to_dict())
    assert whole.fingerprint == written.fingerprint
    assert whole.to_yaml() == written.to_yaml()


def test_the_fingerprint_test_changes_every_field() -> None:
    """Who adds a field adds the change that shows its effect."""
    told: set[tuple[type, str]] = set()
    before = pinned()

    def compare(one: Any, other: Any) -> None:
        if type(one) is type(other) and hasattr(one, "__dataclass_fields__"):
            for key in fields(one):
                mine, theirs = getattr(one, key.name), getattr(other, key.name)
                if mine != theirs:
                    told.add((type(one), key.name))
                    compare(mine, theirs)
        elif isinstance(one, tuple):
            for mine, theirs in zip(one, other, strict=False):
                compare(mine, theirs)

    for change in CHANGES.values():
        plain = before.to_dict()
        change(plain)
        compare(before, Architecture.from_dict(plain))
    kinds = (Architecture, Stack, Layer, Attention, CrossAttention, FeedForward, Router, Backbone)
    plain = before.to_dict()
    CHANGES["encoder"](plain)
    reading = Architecture.from_dict(plain)
    for name in ("cross heads", "cross span"):
        plain = before.to_dict()
        CHANGES[name](plain)
        compare(reading, Architecture.from_dict(plain))
    told.add((CrossAttention, "kv_heads"))  # as that of Attention
    assert {(kind, key.name) for kind in kinds for key in fields(kind)} - told == set()


def single_changes() -> dict[str, tuple[Backbone, Backbone]]:
    """Pairs of backbones that differ in one field alone."""
    learned = Backbone(positions="learned", max_positions=8)
    pairs = {
        "max_positions": (learned, replace(learned, max_positions=9)),
        "positions": (Backbone(), Backbone(positions="none")),
        "biases": (Backbone(activation="relu"), Backbone(activation="relu", biases="all")),
        "head": (Backbone(activation="relu"), Backbone(activation="relu", head="masked")),
        "qkv_width": (Backbone(positions="none", qkv_width=64), Backbone(positions="none", qkv_width=128)),
    }
    for name, value in {"head_size": 16, "activation": "relu", "norm": "layer", "norm_place": "post",
                        "norm_eps": 1e-5, "embedding_norm": True, "rotary_base": 9_999.0, "rotary_fraction": 0.5,
                        "tied": False, "qk_norm": "head", "shared_gate": True}.items():  # fmt: skip
        pairs[name] = Backbone(), replace(Backbone(), **{name: value})
    return pairs


@pytest.mark.parametrize("name", [key.name for key in fields(Backbone)])
def test_each_field_of_the_backbone_alone_changes_the_fingerprint(name: str) -> None:
    pair = single_changes()[name]
    layer = Layer(Attention(2, 2), FeedForward((16,)))
    one, other = (Architecture(Stack(32, (layer,)), backbone) for backbone in pair)
    assert [key.name for key in fields(Backbone) if getattr(pair[0], key.name) != getattr(pair[1], key.name)] == [name]
    assert one.fingerprint != other.fingerprint
    for architecture in (one, other):
        assert Architecture.from_dict(architecture.to_dict()) == architecture


# ---------------------------------------------------------------- what files of before hold


def test_a_file_of_the_first_format_is_refused_in_one_message(tmp_path) -> None:
    """As 0.1 wrote it: width and layers at the top, the weights of the router in the backbone."""
    path = tmp_path / "old.yaml"
    path.write_text("width: 32\nlayers: []\nbackbone: {head_size: 32, router_weights: sum}\n")
    with pytest.raises(MoesaicError, match="files of earlier versions cannot be read") as caught:
        Architecture.from_yaml(path)
    assert caught.value.where == f"{path}: format"
    assert (caught.value.found, caught.value.allowed) == ("no format (version 0.1)", "format: 2")


@pytest.mark.parametrize("weights", ["sum", "softmax"])
def test_router_weights_of_a_backbone_are_refused_with_the_new_key(weights: str) -> None:
    data = {"preset": "tiny", "backbone": {"router_weights": weights}}
    with pytest.raises(MoesaicError, match="router_weights is a key of each router now") as caught:
        load_space(YamlSource("space.yaml", data, {("backbone", "router_weights"): 4}))
    assert caught.value.where == "space.yaml:4: backbone.router_weights"
    assert f"weights: {weights}" in str(caught.value.nearest)


# ---------------------------------------------------------------- addresses


@given(st.lists(st.tuples(st.sampled_from(["decoder", "encoder"]), st.integers(0, 200)), max_size=8))
def test_slots_are_ordered_and_named_by_stack_then_number(pairs: list[tuple[str, int]]) -> None:
    slots = sorted(Slot(*pair) for pair in pairs)
    assert [(slot.stack, slot.index) for slot in slots] == sorted(pairs)
    assert [str(slot) for slot in slots] == [f"{stack}.{index}" for stack, index in sorted(pairs)]
    assert len({*slots}) == len({*pairs})
