from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moesaic.search_spaces import (
    Architecture,
    Attention,
    Backbone,
    FeedForward,
    Layer,
    MoesaicError,
    Router,
    Slot,
    Stack,
)
from moesaic.search_spaces.parts import GATED

tiles = st.integers(1, 8).map(lambda n: 16 * n)


@st.composite
def routers(draw: st.DrawFn, experts: int) -> Router:
    weights = draw(st.sampled_from(["sum", "softmax", "one"]))
    score = draw(st.sampled_from(["softmax", "mass", "mlp"]))
    if draw(st.booleans()):
        return Router("top_k", k=draw(st.integers(1, experts)), weights=weights, score=score)
    threshold, max_k = draw(st.floats(0.01, 0.99)), draw(st.integers(1, 2 * experts))
    return Router("threshold", threshold=threshold, max_k=max_k, weights=weights, score=score)


@st.composite
def feed_forwards(draw: st.DrawFn) -> FeedForward:
    sizes = draw(st.lists(tiles, min_size=1, max_size=6))
    if len(sizes) == 1:
        return FeedForward(tuple(sizes))
    return FeedForward(tuple(sizes), draw(routers(len(sizes))), draw(st.sampled_from([0, 16, 64])))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    kv_heads = draw(st.integers(1, 3))
    return Layer(Attention(kv_heads * draw(st.integers(1, 3)), kv_heads), draw(feed_forwards()))


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    found = tuple(draw(st.lists(layers(), min_size=1, max_size=3)))
    return Architecture(Stack(draw(tiles), found, draw(st.booleans())), draw(backbones()))


def heads(gated: bool) -> st.SearchStrategy[dict]:
    """Every head that a gated or plain activation can have."""
    possible = [{"head": head, "tied": tied} for head in ("linear", "masked") for tied in (True, False)]
    return st.sampled_from([{"head": "none"}, *(one for one in possible if not (gated and one["head"] == "masked"))])


@st.composite
def backbones(draw: st.DrawFn) -> Backbone:
    activation = draw(st.sampled_from(sorted(GATED)))
    positions = draw(st.sampled_from(["rotary", "learned", "none"]))
    rotary = {"rotary_base": 500.0, "rotary_fraction": draw(st.sampled_from([0.5, 1.0]))}
    return Backbone(
        head_size=draw(st.sampled_from([16, 20, 32])),
        activation=activation,
        norm=draw(st.sampled_from(["rms", "layer"])),
        norm_place=draw(st.sampled_from(["pre", "post"])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        embedding_norm=draw(st.booleans()),
        positions=positions,
        **(rotary if positions == "rotary" else {}),
        max_positions=64 if positions == "learned" else None,
        biases=draw(st.sampled_from(["none", "qkv"] if GATED[activation] else ["none", "qkv", "all"])),
        **draw(heads(GATED[activation])),
        qk_norm=draw(st.sampled_from(["none", "head", "all"])),
        shared_gate=draw(st.booleans()),
    )


def pinned() -> Architecture:
    sparse = FeedForward((64, 32, 16), Router("threshold", threshold=0.6, max_k=2), 16)
    return Architecture(
        Stack(32, (Layer(Attention(4, 2), sparse), Layer(Attention(2, 1), FeedForward((128,))))), Backbone(16, "gelu")
    )


PINNED = "b04f778e322f137b"


@given(architectures())
def test_dict_round_trip(architecture: Architecture) -> None:
    again = Architecture.from_dict(architecture.to_dict())
    assert again == architecture
    assert again.fingerprint == architecture.fingerprint


@given(architecture=architectures())
def test_yaml_round_trip(architecture: Architecture, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("yaml") / "architecture.yaml"
    path.write_text(architecture.to_yaml())
    assert Architecture.from_yaml(path) == architecture


@given(architectures())
def test_dict_is_plain_data_without_empty_keys(architecture: Architecture) -> None:
    def walk(value: object) -> None:
        assert type(value) in (dict, list, int, float, str, bool)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner)

    walk(architecture.to_dict())
    for layer in architecture.to_dict()["decoder"]["layers"]:
        assert layer["feed_forward"].get("shared_size") != 0


@given(st.lists(tiles, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_order_of_experts_has_no_meaning(sizes: list[int], rng: Random) -> None:
    shuffled = rng.sample(sizes, len(sizes))
    router = Router("top_k", k=2)
    first, second = (_one_layer(FeedForward(tuple(s), router)) for s in (sizes, shuffled))
    assert first == second
    assert hash(first) == hash(second)
    assert first.fingerprint == second.fingerprint
    assert first.to_yaml() == second.to_yaml()
    assert sorted(first.decoder.layers[0].feed_forward.expert_sizes) == sorted(sizes)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Router("threshold", threshold=0.4, max_k=3), Router("threshold", threshold=0.4, max_k=99)),
        (Router("threshold", threshold=0.4, max_k=2), Router("threshold", threshold=0.4, max_k=3)),
        (Router("threshold", threshold=0.3, max_k=3), Router("top_k", k=1)),
        (Router("threshold", threshold=0.4, max_k=1), Router("top_k", k=1)),
        (Router("threshold", threshold=0.4, max_k=1), Router("threshold", threshold=0.9, max_k=1)),
    ],
)
def test_equivalent_spellings_of_a_router_are_one_architecture(first: Router, second: Router) -> None:
    one, other = (_one_layer(FeedForward((16, 16, 16), router)) for router in (first, second))
    assert one == other
    assert one.fingerprint == other.fingerprint


def _one_layer(part: FeedForward) -> Architecture:
    return Architecture(Stack(32, (Layer(Attention(1, 1), part),)))


def test_fingerprint_is_pinned() -> None:
    assert pinned().fingerprint == PINNED


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_fingerprint_is_the_same_in_every_process(hash_seed: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(pinned().to_yaml())
    code = (
        "import sys; from moesaic.search_spaces import Architecture as A; print(A.from_yaml(sys.argv[1]).fingerprint)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == PINNED


@given(st.lists(architectures(), min_size=2, max_size=8))
def test_fingerprints_are_equal_exactly_where_values_are(found: list[Architecture]) -> None:
    for one in found:
        for other in found:
            assert (one == other) == (one.fingerprint == other.fingerprint)


def _changed(change: Callable[[dict], None]) -> Architecture:
    plain = pinned().to_dict()
    change(plain)
    return Architecture.from_dict(plain)


CHANGES: dict[str, Callable[[dict], None]] = {
    "width": lambda d: d["decoder"].update(width=48),
    "heads": lambda d: d["decoder"]["layers"][0]["attention"].update(heads=2),
    "kv_heads": lambda d: d["decoder"]["layers"][0]["attention"].update(kv_heads=4),
    "order of layers": lambda d: d["decoder"]["layers"].reverse(),
    "depth": lambda d: d["decoder"]["layers"].pop(),
    "size": lambda d: d["decoder"]["layers"][0]["feed_forward"].update(expert_sizes=[64, 32, 32]),
    "threshold": lambda d: d["decoder"]["layers"][0]["feed_forward"]["router"].update(threshold=0.61),
    "max_k": lambda d: d["decoder"]["layers"][0]["feed_forward"]["router"].update(max_k=1),
    "router": lambda d: d["decoder"]["layers"][0]["feed_forward"].update(router={"kind": "top_k", "k": 2}),
    "shared": lambda d: d["decoder"]["layers"][0]["feed_forward"].pop("shared_size"),
    "activation": lambda d: d["backbone"].update(activation="relu"),
    "head_size": lambda d: d["backbone"].update(head_size=32),
    "router weights": lambda d: d["decoder"]["layers"][0]["feed_forward"]["router"].update(weights="softmax"),
    "router score": lambda d: d["decoder"]["layers"][0]["feed_forward"]["router"].update(score="mass"),
    "mlp router": lambda d: d["decoder"]["layers"][0]["feed_forward"]["router"].update(score="mlp"),
    "causal": lambda d: d["decoder"].update(causal=False),
    "norm": lambda d: d["backbone"].update(norm="layer"),
    "norm_place": lambda d: d["backbone"].update(norm_place="post"),
    "norm_eps": lambda d: d["backbone"].update(norm_eps=1e-5),
    "embedding_norm": lambda d: d["backbone"].update(embedding_norm=True),
    "positions": lambda d: d["backbone"].update(positions="none"),
    "learned positions": lambda d: d["backbone"].update(positions="learned", max_positions=8),
    "rotary_base": lambda d: d["backbone"].update(rotary_base=500.0),
    "rotary_fraction": lambda d: d["backbone"].update(rotary_fraction=0.5),
    "biases": lambda d: d["backbone"].update(biases="all"),
    "qk_norm": lambda d: d["backbone"].update(qk_norm="all"),
    "shared_gate": lambda d: d["backbone"].update(shared_gate=True),
    "tied": lambda d: d["backbone"].update(tied=False),
    "head": lambda d: d["backbone"].update(head="masked"),
    "no head": lambda d: d["backbone"].update(head="none"),
    "qkv_width": lambda d: (
        _alike(d),
        d["backbone"].update(qkv_width=64, positions="none"),
        d["backbone"].pop("head_size"),
    ),
    "encoder": lambda d: d.update(_translating(d)),
    "cross heads": lambda d: d.update(_translating(d, heads=4)),
    "cross span": lambda d: d.update(_translating(d, span=2)),
}


def _alike(plain: dict) -> None:
    """As many key/value heads as heads."""
    for layer in plain["decoder"]["layers"]:
        layer["attention"]["kv_heads"] = layer["attention"]["heads"]


def _translating(plain: dict, heads: int = 2, span: int = 1) -> dict:
    """The stacks of a network that translates, made of a language model's."""
    stack = plain["decoder"]
    reading = [{**layer, "cross": {"heads": heads, "kv_heads": 2, "span": span}} for layer in stack["layers"]]
    return {"encoder": {**stack, "causal": False}, "decoder": {**stack, "layers": reading}}


def test_a_span_and_heads_of_cross_attention_are_choices_of_their_own() -> None:
    found = {_changed(CHANGES[name]).fingerprint for name in ("encoder", "cross heads", "cross span")}
    assert len(found) == 3


REFUSED = {
    "needs cross-attention": lambda d: d.update(encoder={**d["decoder"], "causal": False}),
    "has nothing to read by cross-attention": lambda d: d.update(decoder=_translating(d)["decoder"]),
    "reads more encoder layers than there are": lambda d: d.update(_translating(d, span=3)),
    "qkv_width 48 cannot be divided among the heads": lambda d: (
        CHANGES["qkv_width"](d), d["backbone"].update(qkv_width=48), d["decoder"]["layers"][1]["attention"].update(
            heads=5, kv_heads=5)),
    "cannot be divided among the heads": lambda d: d["backbone"].update(
        {"qkv_width": 64, "positions": "none", "head_size": 32}),
    "a head has one size": lambda d: d["backbone"].update(qkv_width=64, positions="none"),
    "heads of different sizes": lambda d: (CHANGES["qkv_width"](d), d["backbone"].pop("positions")),
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_what_stacks_and_widths_cannot_be_is_refused(problem: str) -> None:
    with pytest.raises(MoesaicError, match=problem):
        _changed(REFUSED[problem])


@pytest.mark.parametrize("change", CHANGES)
def test_every_choice_changes_the_fingerprint(change: str) -> None:
    changed = _changed(CHANGES[change])
    assert changed != pinned()
    assert changed.fingerprint != pinned().fingerprint


def test_neurons_and_worst_active_neurons() -> None:
    sparse = FeedForward((16, 64, 32), Router("threshold", threshold=0.6, max_k=2), 16)
    assert (sparse.experts, sparse.neurons, sparse.worst_active_neurons) == (3, 128, 64 + 32 + 16)
    dense = FeedForward((128,))
    assert (dense.experts, dense.neurons, dense.worst_active_neurons) == (1, 128, 128)


TEXT = """\
format: 2
decoder:
  width: 32
  layers:
  - attention: {heads: 4, kv_heads: 2}
    feed_forward:
      expert_sizes: [64, 32]
      router:
        kind: top_k
        k: 2
"""

MISTAKES = {
    # what is written: (in place of what, place, the nearest right value or None)
    "expert_size: [": ("expert_sizes: [", "a.yaml:7: decoder.layers.0.feed_forward.expert_size", "expert_sizes"),
    "  widht: 32": ("  width: 32", "a.yaml:3: decoder.widht", "width"),
    "  width: wide": ("  width: 32", "a.yaml:3: decoder.width", None),
    "  width: 40": ("  width: 32", "a.yaml:2: decoder", 32),
    "[64, 30]": ("[64, 32]", "a.yaml:6: decoder.layers.0.feed_forward", 32),
    "[64, many]": ("[64, 32]", "a.yaml:7: decoder.layers.0.feed_forward.expert_sizes.1", None),
    "kv_heads: 3": ("kv_heads: 2", "a.yaml:5: decoder.layers.0.attention", None),
    "        k: 3": ("        k: 2", "a.yaml:6: decoder.layers.0.feed_forward", None),
    "        k: 0": ("        k: 2", "a.yaml:8: decoder.layers.0.feed_forward.router", None),
    "        max_k: 2": ("        k: 2", "a.yaml:8: decoder.layers.0.feed_forward.router", None),
    "        kind: topk": ("        kind: top_k", "a.yaml:9: decoder.layers.0.feed_forward.router.kind", "top_k"),
    "      shared_size: 8\n      router:": ("      router:", "a.yaml:6: decoder.layers.0.feed_forward", 16),
    "[64]": ("[64, 32]", "a.yaml:6: decoder.layers.0.feed_forward", None),
    "[]": ("[64, 32]", "a.yaml:6: decoder.layers.0.feed_forward", None),
    "{heads: 4}": ("{heads: 4, kv_heads: 2}", "a.yaml:5: decoder.layers.0.attention.kv_heads", None),
}


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_is_refused_with_its_line_and_key(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, where, nearest = MISTAKES[wrong]
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(TEXT)
    Architecture.from_yaml("a.yaml")
    assert TEXT.count(right) == 1
    Path("a.yaml").write_text(TEXT.replace(right, wrong))
    with pytest.raises(MoesaicError) as caught:
        Architecture.from_yaml("a.yaml")
    assert caught.value.where == where
    assert caught.value.nearest == nearest
    assert str(caught.value).startswith(f"{where}: {caught.value.problem}")


@pytest.mark.parametrize(
    ("make", "found", "allowed"),
    [
        (lambda: Attention(6, 4), "4 of 6", [1, 2, 3, 6]),
        (lambda: FeedForward((16, 16), Router("top_k", k=3)), 3, "1 to 2"),
        (lambda: Router("threshold", threshold=1.0, max_k=2), 1.0, "0 < threshold < 1"),
        (lambda: Backbone(head_size=15), "15 of a head_size of 15", "an even head_size x rotary_fraction"),
        (
            lambda: Backbone(head_size=16, rotary_fraction=0.3),
            "5 of a head_size of 16",
            "an even head_size x rotary_fraction",
        ),
        (lambda: Backbone(rotary_base=1), "base 1, fraction 1", "rotary_base > 1 and 0 < rotary_fraction <= 1"),
        (lambda: Backbone(norm_eps=1.0), 1.0, "0 < norm_eps < 1"),
        (lambda: Backbone(activation="geglu", biases="all"), "geglu", "biases: none or qkv"),
        (lambda: Backbone(head="masked"), "swiglu", "head: linear or none"),
        (lambda: Backbone(head="none", tied=False), "tied: false", "tied: true"),
    ],
)
def test_an_impossible_value_is_refused_with_the_possible_ones(make: Callable, found: object, allowed: object) -> None:
    with pytest.raises(MoesaicError) as caught:
        make()
    assert (caught.value.found, caught.value.allowed) == (found, allowed)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Router("top_k"),
        lambda: Router("top_k", k=1, threshold=0.5),
        lambda: Router("threshold", threshold=0.5),
        lambda: Router("threshold", threshold=0.5, max_k=2, k=1),
        lambda: FeedForward((16, 16)),
        lambda: FeedForward((16,), Router("top_k", k=1)),
        lambda: FeedForward((16,), shared_size=16),
        lambda: FeedForward((16, 16), Router("top_k", k=1), -16),
        lambda: FeedForward((0,)),
        lambda: Stack(32, ()),
        lambda: Backbone(positions="learned"),
        lambda: Backbone(max_positions=8),
        lambda: Backbone(positions="learned", max_positions=0),
        lambda: Backbone(head_size=0),
        lambda: Attention(0, 1),
    ],
)
def test_contradictions_are_refused(make: Callable) -> None:
    with pytest.raises(ValueError):
        make()


def test_from_dict_names_its_source_and_refuses_other_data() -> None:
    for data in (None, [1], "small", {"format": 2, "decoder": 3}):
        with pytest.raises(MoesaicError) as caught:
            Architecture.from_dict(data, "trial 7")
        assert caught.value.where is not None
        assert caught.value.where.startswith("trial 7")


def test_yaml_is_readable_without_this_program() -> None:
    assert yaml.safe_load(pinned().to_yaml())["decoder"]["layers"][0]["feed_forward"]["expert_sizes"] == [64, 32, 16]


@pytest.mark.parametrize("format", [None, 1, 3, "2"])
def test_an_architecture_in_another_format_is_refused(format: object) -> None:
    plain = pinned().to_dict()
    assert plain.pop("format") == 2
    data = plain if format is None else {**plain, "format": format}
    with pytest.raises(MoesaicError, match="another format: files of earlier versions cannot be read") as caught:
        Architecture.from_dict(data, "trial 7")
    assert caught.value.where == "trial 7: format"
    assert caught.value.allowed == "format: 2"


def test_every_layer_has_an_address() -> None:
    architecture = pinned()
    first, second = Slot("decoder", 0), Slot("decoder", 1)
    assert list(architecture.layers) == [first, second] == sorted(architecture.layers)
    assert [str(slot) for slot in architecture.layers] == ["decoder.0", "decoder.1"]
    assert tuple(architecture.layers.values()) == architecture.decoder.layers
    changed = architecture.with_layers({second: architecture.layers[first]})
    assert changed.decoder.layers == (architecture.layers[first],) * 2
    assert architecture.with_layers({}) == architecture
    assert architecture.width_at(second) == architecture.output.width == 32


def test_default_values_are_not_written() -> None:
    assert Architecture(pinned().decoder).to_dict()["backbone"] == {"head_size": 32, "activation": "swiglu"}
    assert "causal" not in pinned().to_dict()["decoder"]
    assert "weights" not in pinned().to_dict()["decoder"]["layers"][0]["feed_forward"]["router"]
