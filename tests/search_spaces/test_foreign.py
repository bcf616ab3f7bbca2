"""Files of HAT and AutoMoE: what they say arrives, and what is wrong with one is a message with line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.search_spaces import Architecture, MoesaicError, Router, load_space, read_hat
from moesaic.search_spaces.yaml_source import YamlSource
from tests.search_spaces.hat_files import HAT_NETWORKS, hat_file

SPACES = {name: load_space(YamlSource("test", name)) for name in ("hat_wmt", "hat_iwslt")}
NETWORK = next(network for network in HAT_NETWORKS if network["arbitrary"] == "-1 1 -1 1 2 -1")
TEXT = hat_file(NETWORK)
MOE = (
    TEXT
    + """\
encoder-n-experts: [3, 1, 1, 1, 1, 2]
decoder-n-experts: [1, 1, 1, 1, 1, 4]
encoder-each-expert-ffn-dim-listoflist: ['1024_3072_2048', '1024', '3072', '3072', '3072', '512_1024']
"""
)


@pytest.fixture
def read(tmp_path: Path):
    def of(text: str) -> Architecture:
        path = tmp_path / "network.yml"
        path.write_text(text, encoding="utf-8")
        return read_hat(path)

    return of


def test_every_published_network_is_a_member_of_its_space(read) -> None:
    for network in HAT_NETWORKS:
        space = SPACES["hat_iwslt" if "IWSLT" in network["task"] else "hat_wmt"]
        assert space.why_not(read(hat_file(network))) is None


def test_a_network_has_what_its_file_says(read) -> None:
    found = read(TEXT)
    assert found.encoder is not None
    for name, stack in (("encoder", found.encoder), ("decoder", found.decoder)):
        assert str(stack.width) == NETWORK[f"{name}_width"]
        assert [layer.feed_forward.expert_sizes for layer in stack.layers] == [
            (int(size),) for size in NETWORK[f"{name}_ffn"].split()
        ]
        assert [str(layer.attention.heads) for layer in stack.layers] == NETWORK[f"{name}_heads"].split()
    crosses = [layer.cross for layer in found.decoder.layers if layer.cross]
    assert [str(cross.heads) for cross in crosses] == NETWORK["cross_heads"].split()
    assert [cross.span for cross in crosses] == [1, 2, 1, 2, 3, 1]  # -1, 1 and 2 are the last 1, 2 and 3 layers


def test_a_mixture_has_the_sizes_and_routers_of_its_file(read) -> None:
    found = read(MOE)
    assert found.encoder is not None
    parts = [layer.feed_forward for layer in found.encoder.layers]
    assert [part.expert_sizes for part in parts][:2] == [(3072, 2048, 1024), (1024,)]
    assert parts[5].expert_sizes == (1024, 512)
    assert [part.router for part in parts][:2] == [Router("top_k", k=1, weights="softmax"), None]
    last = found.decoder.layers[5].feed_forward  # without a list of sizes, all experts have that of the layer
    assert last.expert_sizes == (int(NETWORK["decoder_ffn"].split()[5]),) * 4
    several = read(MOE + "decoder-num-experts-to-route: [1, 1, 1, 1, 1, 2]\n")
    assert several.decoder.layers[5].feed_forward.router == Router("top_k", k=2, weights="softmax")


def test_entries_behind_the_depth_are_not_used(read) -> None:
    shallow = read(TEXT.replace("decoder-layer-num-subtransformer: 6", "decoder-layer-num-subtransformer: 2"))
    assert shallow.decoder.layers == read(TEXT).decoder.layers[:2]


DEPTH = "decoder-layer-num-subtransformer: 6"
WRONG = {
    "missing": (TEXT, DEPTH, "", "decoder-layer-num-subtransformer: missing key"),
    "unknown": (TEXT, "ende-attention-heads", "ende-attention-head", ":9: decoder-ende-attention-head-all-sub"),
    "too short": (
        TEXT,
        DEPTH,
        DEPTH.replace("6", "7"),
        ":7: decoder-ffn-embed-dim-all-subtransformer: a list is short",
    ),
    "no number": (TEXT, DEPTH, DEPTH.replace("6", "six"), ":6: decoder-layer-num-subtransformer"),
    "no span": (TEXT, "[-1, 1", "[0, 1", ":10: decoder-arbitrary-ende-attn-all-subtransformer.0: not one of"),
    "no heads": (TEXT, "all-subtransformer: [8", "all-subtransformer: [7", "qkv_width 512 cannot be divided"),
    "no tile": (TEXT, "[3072", "[3000", "expert size must be a multiple of 16"),
    "no width": (TEXT, "dim-subtransformer: 512", "dim-subtransformer: 500", ":1: encoder-embed-dim-subtransformer"),
    "too few layers": (
        TEXT,
        "encoder-layer-num-subtransformer: 6",
        "encoder-layer-num-subtransformer: 2",
        "reads more",
    ),
    "too few sizes": (MOE, "'512_1024'", "'512'", ":13: encoder-each-expert-ffn-dim-listoflist.5: layer encoder.5 has"),
    "no sizes": (MOE, "'512_1024'", "'a_b'", ":13: encoder-each-expert-ffn-dim-listoflist.5"),
    "no YAML": (TEXT, TEXT, "a: [", ":1:5: YAML syntax error"),
    "no keys": (TEXT, TEXT, "text", "is no sub-transformer file"),
    "too many": (
        MOE + "encoder-num-experts-to-route: [4, 1, 1, 1, 1, 1]\n",
        "",
        "",
        ":14: encoder-num-experts-to-route",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_place(read, case: str) -> None:
    text, old, new, message = WRONG[case]
    with pytest.raises(MoesaicError) as caught:
        read(text.replace(old, new, 1) if old else text)
    assert str(caught.value).count("network.yml") == 1
    assert message in str(caught.value)
