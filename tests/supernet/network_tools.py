"""Small networks on every kind of backbone, with weights large enough to affect the outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, Router, Stack, load_space
from moesaic.search_spaces.parts import GATED
from moesaic.search_spaces.yaml_source import YamlSource
from moesaic.supernet import Batch, Transformer
from tests.search_spaces.test_architecture import heads

WIDTH, HEADS, NEURONS, LENGTH, VOCABULARY = 48, 4, 64, 7, 23
POSITIONS = 12
"""As many as learned positions have vectors for."""
DENSE = Layer(Attention(HEADS, HEADS), FeedForward((NEURONS,)))
SPARSE = Layer(Attention(4, 2), FeedForward((32, 16, 16), Router("threshold", threshold=0.6, max_k=2), 16))
SPACE = load_space(YamlSource("test", "tiny"))


def network(backbone: Backbone, *layers: Layer, causal: bool = True) -> Architecture:
    return Architecture(Stack(WIDTH, layers or (DENSE, DENSE), causal), backbone)


def on(backbone: Backbone, architecture: Architecture, causal: bool = True) -> Architecture:
    """The same layers on another backbone."""
    return replace(architecture, backbone=backbone, decoder=replace(architecture.decoder, causal=causal))


def randomised(model: Transformer, seed: int = 0) -> Transformer:
    """Weights large enough to matter, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens_of(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_batch(places: list[tuple[int, int]], width: int, seed: int = 0) -> Batch:
    """Sequences at ``places`` (start, stop) of ``width``, padded with random tokens."""
    windows = tokens_of(len(places), width + 1, seed)
    columns = torch.arange(width)
    mask = torch.stack([(columns >= start) & (columns < stop) for start, stop in places])
    return Batch(windows[:, :-1], windows[:, 1:], mask)


@st.composite
def backbones(draw: st.DrawFn) -> Backbone:
    """Every choice, with a norm_eps and a rotary_base that are seen in the logits."""
    activation = draw(st.sampled_from(sorted(GATED)))
    positions = draw(st.sampled_from(["rotary", "learned", "none"]))
    rotary = {
        "rotary_base": draw(st.sampled_from([10_000.0, 20.0])),
        "rotary_fraction": draw(st.sampled_from([1.0, 0.5])),
    }
    return Backbone(
        head_size=draw(st.sampled_from([16, 20])),
        activation=activation,
        norm=draw(st.sampled_from(["rms", "layer"])),
        norm_place=draw(st.sampled_from(["pre", "post"])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-2])),
        embedding_norm=draw(st.booleans()),
        positions=positions,
        **(rotary if positions == "rotary" else {}),
        max_positions=POSITIONS if positions == "learned" else None,
        biases=draw(st.sampled_from(["none", "qkv"] if GATED[activation] else ["none", "qkv", "all"])),
        **draw(heads(GATED[activation])),
        qk_norm=draw(st.sampled_from(["none", "head", "all"])),
        shared_gate=draw(st.booleans()),
    )


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Dense and sparse, with every kind of router and a shared expert."""
    kv_heads = draw(st.integers(1, 2))
    attention = Attention(kv_heads * draw(st.integers(1, 3)), kv_heads)
    sizes = tuple(draw(st.lists(st.sampled_from([16, 32, 48]), min_size=1, max_size=4)))
    if len(sizes) == 1:
        return Layer(attention, FeedForward(sizes))
    weights, score = draw(st.sampled_from(["sum", "softmax"])), draw(st.sampled_from(["softmax", "mass", "mlp"]))
    router = draw(
        st.one_of(
            st.builds(
                Router,
                st.just("top_k"),
                k=st.integers(1, len(sizes)),
                weights=st.just(weights),
                score=st.just(score),
            ),
            st.builds(
                Router,
                st.just("threshold"),
                threshold=st.sampled_from([0.3, 0.6, 0.9]),
                max_k=st.integers(1, 4),
                weights=st.just(weights),
                score=st.just(score),
            ),
        )
    )
    return Layer(attention, FeedForward(sizes, router, draw(st.sampled_from([0, 16]))))


@st.composite
def networks(draw: st.DrawFn) -> Architecture:
    width = draw(st.sampled_from([32, 48]))
    found = tuple(draw(st.lists(layers(), min_size=1, max_size=2)))
    return Architecture(Stack(width, found, draw(st.booleans())), draw(backbones()))
