from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.search_spaces import MoesaicError, load_space, preset_names, preset_source
from moesaic.search_spaces.yaml_source import YamlSource, parse_yaml, read_yaml

PRESETS = ["automoe_wmt", "hat_iwslt", "hat_wmt", "medium", "moesaic_wmt", "small", "tiny", "translation", "xmoe"]
TEXT = """\
width: [32, 48]
depth: [1, 2]
layer:
  heads: [2]
  kv_heads: [1, 2]
  experts: [1, 2]
  expert_sizes: [16, 32]
  dense_sizes: [32]
  routers:
    - {kind: top_k, k: [1]}
layers:
  1:
    experts: [1]
"""


def test_presets_exist_and_load() -> None:
    assert preset_names() == PRESETS
    for name in preset_names():
        space = load_space(YamlSource("test", name))
        assert space.name == name
        assert space.cardinality > 1000
        assert space == load_space(preset_source(name))


def test_a_space_reads_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(TEXT)
    space = load_space(read_yaml(tmp_path / "space.yaml"))
    assert (space.decoder.widths, space.decoder.depths, space.name) == ((32, 48), (1, 2), "custom")
    # 2 pairs of heads x (1 dense + 3 multisets), and a second layer that is dense
    assert space.cardinality == 2 * (2 * 4 + 2 * 4 * 2 * 1)


def test_order_and_repetition_in_a_list_have_no_meaning() -> None:
    messy = TEXT.replace("[32, 48]", "[48, 32, 48]").replace("[16, 32]", "[32, 16, 32]").replace("[1, 2]", "[2, 1, 2]")
    assert load_space(parse_yaml(messy, "test")) == load_space(parse_yaml(TEXT, "test"))


def test_overrides_of_a_preset_replace_lists_and_keep_the_rest() -> None:
    tiny = load_space(YamlSource("test", "tiny"))
    changed = load_space(parse_yaml("preset: tiny\nwidth: [64]\nlayer: {heads: [4]}\n", "test"))
    assert changed.decoder.widths == (64,)
    assert {a.heads for a in changed.decoder.layers[0].attentions} == {4}
    assert {a.kv_heads for a in changed.decoder.layers[0].attentions} == {1, 2}
    assert changed.decoder.layers[0].groups == tiny.decoder.layers[0].groups
    assert changed.backbone == tiny.backbone
    assert load_space(parse_yaml("{preset: tiny, backbone: {head_size: 8}}", "test")).backbone.activation == "swiglu"


MISTAKES = {
    # what is written: (in place of what, place, nearest)
    "widht: [32]": ("width: [32, 48]", "space.yaml:1: widht", "width"),
    "width: 32": ("width: [32, 48]", "space.yaml:1: width", None),
    "width: [32, 40]": ("width: [32, 48]", "space.yaml", 32),
    "width: []": ("width: [32, 48]", "space.yaml", None),
    "depth: [1, 0]": ("depth: [1, 2]", "space.yaml:2: depth.1", None),
    "  head: [2]": ("  heads: [2]", "space.yaml:4: layer.head", "heads"),
    "  heads: [2, two]": ("  heads: [2]", "space.yaml:4: layer.heads.1", None),
    "  kv_heads: [3]": ("  kv_heads: [1, 2]", "space.yaml:3: layer", None),
    "  expert_sizes: [16, 30]": ("  expert_sizes: [16, 32]", "space.yaml:3: layer", 32),
    "  expert_sizes: []": ("  expert_sizes: [16, 32]", "space.yaml:3: layer", None),
    "  dense_sizes: []": ("  dense_sizes: [32]", "space.yaml:3: layer", None),
    "    - {kind: top_k, k: [3]}": ("    - {kind: top_k, k: [1]}", "space.yaml:3: layer", None),
    "    - {kind: top_k, max_k: [3]}": ("    - {kind: top_k, k: [1]}", "space.yaml:10: layer.routers.0", None),
    "    - {kind: top_k}": ("    - {kind: top_k, k: [1]}", "space.yaml:10: layer.routers.0", None),
    "    - {kind: treshold}": ("    - {kind: top_k, k: [1]}", "space.yaml:10: layer.routers.0.kind", "threshold"),
    "    - {kind: threshold, threshold: [1.5], max_k: [2]}": (
        "    - {kind: top_k, k: [1]}", "space.yaml:10: layer.routers.0", None),
    "    expert: [1]": ("    experts: [1]", "space.yaml:13: layers.1.expert", "experts"),
    "  2:": ("  1:", "space.yaml:12: layers.2", None),
    "  first:": ("  1:", "space.yaml:12: layers.first", None),
    "    experts: [1]\n    dense_sizes: [8]": ("    experts: [1]", "space.yaml:12: layers.1", 16),
}  # fmt: skip


@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_mistake_is_refused_with_its_line_and_key(wrong: str) -> None:
    right, where, nearest = MISTAKES[wrong]
    assert TEXT.count(f"{right}\n") == 1
    with pytest.raises(MoesaicError) as caught:
        load_space(parse_yaml(TEXT.replace(f"{right}\n", f"{wrong}\n"), "space.yaml"))
    assert caught.value.where == where
    assert caught.value.nearest == nearest


def test_an_unknown_preset_is_refused_with_the_nearest_and_all() -> None:
    with pytest.raises(MoesaicError) as caught:
        load_space(parse_yaml("# mine\npreset: smal\n", "space.yaml"))
    error = caught.value
    assert (error.where, error.nearest, error.allowed) == (
        "space.yaml:2: preset",
        "small",
        ", ".join(PRESETS),
    )
    with pytest.raises(MoesaicError):
        preset_source("../presets/small")


@pytest.mark.parametrize("text", ["", "3", "[tiny]"])
def test_a_space_is_a_name_or_a_mapping(text: str) -> None:
    with pytest.raises(MoesaicError) as caught:
        load_space(parse_yaml(text, "space.yaml"))
    assert caught.value.where == "space.yaml"
    assert "tiny" in str(caught.value.allowed)


# ---------------------------------------------------------------- spaces of HAT and AutoMoE

AUTOMOE = {
    2: (1.7e18, 6.9e21, 2.2e20),
    4: (6.9e21, 6.8e33, 1.8e27),
    6: (8.9e23, 2.2e45, 8.2e31),
    16: (1.1e29, 4.0e102, 5.2e44),
}
"""By the most experts of a layer: of equal size; ordered; up to their order (arXiv 2210.07535, and counted)."""


def automoe(most: int, equal: bool):
    layer = {"experts": list(range(1, most + 1)), "equal_sizes": equal}
    return load_space(YamlSource("test", {"preset": "automoe_wmt", "layer": layer, "encoder": {"layer": layer}}))


@pytest.mark.parametrize("most", AUTOMOE)
def test_automoes_spaces_are_as_large_as_published(most: int) -> None:
    std, ordered, distinct = AUTOMOE[most]
    equal, fract = automoe(most, True), automoe(most, False)
    assert float(f"{equal.cardinality:.1e}") == float(f"{equal.raw_cardinality:.1e}") == std
    assert float(f"{fract.raw_cardinality:.1e}") == ordered
    assert float(f"{fract.cardinality:.1e}") == distinct
    assert load_space(preset_source("automoe_wmt")) == automoe(6, False)


def test_parts_of_a_layer_of_automoe_are_as_many_as_published() -> None:
    layer = load_space(preset_source("automoe_wmt")).decoder.layers[0]
    assert sum(group.raw_count for group in layer.groups) == 1092
    assert sum(group.count for group in layer.groups) == 83


@pytest.mark.parametrize("name", ["hat_wmt", "hat_iwslt"])
def test_hats_spaces_are_as_large_as_published(name: str) -> None:
    space = load_space(preset_source(name))
    assert float(f"{space.cardinality:.2e}") == float(f"{space.raw_cardinality:.2e}") == 4.18e14
    # HAT's genotypes carry the genes of all six decoder layers, whatever the depth.
    assert space.encoder is not None
    whole = space.encoder.count
    for layer in space.decoder.layers:
        whole *= layer.count
    genotypes = whole * len(space.decoder.widths) * len(space.decoder.depths)
    assert float(f"{genotypes:.2e}") == 2.44e15


def test_the_space_of_hats_latency_data_is_as_large_as_published() -> None:
    layer = {"heads": [2, 4, 8], "dense_sizes": [512, 1024, 2048, 3072]}
    cross = {"cross": {"heads": [2, 4, 8]}}
    space = load_space(YamlSource("test", {"preset": "hat_wmt", "layer": layer | cross, "encoder": {"layer": layer}}))
    assert float(f"{space.cardinality:.2e}") == 1.91e19


def test_equal_sizes_are_asked_of_members() -> None:
    fract = automoe(2, False).largest
    part = fract.decoder.layers[0].feed_forward
    changed = {
        slot: replace(layer, feed_forward=replace(part, expert_sizes=(3072, 1024)))
        for slot, layer in fract.layers.items()
    }
    assert fract.with_layers(changed) in automoe(2, False)
    assert automoe(2, True).why_not(fract.with_layers(changed)) == (
        "encoder.layers.0.feed_forward.expert_sizes", [3072, 1024], "experts of one size",
    )  # fmt: skip
