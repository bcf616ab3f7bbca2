"""Every kind of backbone against torch's own modules, slices of it against extracted models, and padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from moesaic.search_spaces import (
    Architecture,
    Attention,
    Backbone,
    FeedForward,
    Layer,
    MoesaicError,
    Router,
    Stack,
    load_space,
)
from moesaic.search_spaces.parts import GATED
from moesaic.search_spaces.yaml_source import YamlSource
from moesaic.supernet import KeyValueCache, Transformer
from moesaic.supernet.model import TransformerLayer

WIDTH, HEADS, NEURONS, LENGTH = 48, 4, 64, 7
DENSE = Layer(Attention(HEADS, HEADS), FeedForward((NEURONS,)))
SPARSE = Layer(Attention(4, 2), FeedForward((32, 16, 16), Router("threshold", threshold=0.6, max_k=2), 16))
SPACE = load_space(YamlSource("test", "tiny"))


def network(backbone: Backbone, *layers: Layer, causal: bool = True) -> Architecture:
    return Architecture(Stack(WIDTH, layers or (DENSE, DENSE), causal), backbone)


def randomised(model: Transformer, seed: int = 0) -> Transformer:
    """Weights large enough to matter, norms and biases included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens_of(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, 23, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- torch's own modules


def torch_layer(own: TransformerLayer, backbone: Backbone, activation: Callable[[Tensor], Tensor]) -> nn.Module:
    """``nn.TransformerEncoderLayer`` with the same weights."""
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, NEURONS, dropout=0.0, activation=activation, layer_norm_eps=backbone.norm_eps,
        batch_first=True, norm_first=backbone.norm_place == "pre", bias=True,
    )  # fmt: skip
    a, f = own.attention, own.feed_forward
    weights = {
        "self_attn.in_proj_weight": torch.cat([a.q, a.k, a.v]),
        "self_attn.out_proj.weight": a.o,
        "linear1.weight": f.up,
        "linear2.weight": f.down.T,
        "norm1.weight": own.attention_norm.weight,
        "norm2.weight": own.feed_forward_norm.weight,
        "norm1.bias": own.attention_norm.bias,
        "norm2.bias": own.feed_forward_norm.bias,
    }
    if backbone.biases == "all":
        weights |= {
            "self_attn.in_proj_bias": torch.cat([a.q_bias, a.k_bias, a.v_bias]),
            "self_attn.out_proj.bias": a.o_bias,
            "linear1.bias": f.up_bias,
            "linear2.bias": f.down_bias,
        }
    state = {name: torch.zeros_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict({**state, **weights})
    return layer.eval()


def gelu_tanh(x: Tensor) -> Tensor:
    """No ``nn.GELU``: torch's layer takes every one of those for the exact function."""
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("biases", ["none", "all"])
@pytest.mark.parametrize("norm_place", ["pre", "post"])
@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("gelu", F.gelu), ("gelu_tanh", gelu_tanh)])
@torch.no_grad()
def test_a_network_with_layer_norm_is_that_of_torch(activation, function, norm_place, biases, causal) -> None:
    """As GPT-2, OPT and BERT are built: learned positions, a norm of the embedding, an output of its own."""
    backbone = Backbone(
        WIDTH // HEADS, activation, "layer", norm_place, 1e-5, embedding_norm=norm_place == "post",
        positions="learned", max_positions=LENGTH, biases=biases, tied=norm_place == "pre",
    )  # fmt: skip
    model, tokens = randomised(Transformer(network(backbone, causal=causal), 23)), tokens_of()
    stack = model.get_submodule("stacks.decoder")
    x = stack.embedding(tokens) + stack.positions(torch.arange(LENGTH))
    if backbone.embedding_norm:
        x = F.layer_norm(x, (WIDTH,), stack.embedding_norm.weight, stack.embedding_norm.bias, 1e-5)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None
    for layer in model.layers:
        x = torch_layer(layer, backbone, function)(x, src_mask=mask, is_causal=causal)
    if norm_place == "pre":
        x = F.layer_norm(x, (WIDTH,), stack.norm.weight, stack.norm.bias, 1e-5)
    expected = x @ (stack.embedding.weight if backbone.tied else model.output).T
    found = model(tokens)
    assert found.abs().max() > 0.3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def rotated(x: Tensor, base: float, size: int) -> Tensor:
    """Rotary positions with complex numbers on the first ``size`` values of each head in [B, H, S, C]."""
    half = size // 2
    angle = torch.arange(x.shape[2])[:, None] * base ** (-torch.arange(half) * 2 / size)
    turned = torch.complex(x[..., :half], x[..., half:size]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, x[..., size:]], -1)


GATES = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": nn.GELU(approximate="tanh")}


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"rotary_base": 500.0, "rotary_fraction": 0.5}, {"biases": "qkv"}, {"positions": "none", "tied": False}],
    ids=["Llama", "part of a head", "Qwen2", "no positions"],
)
@torch.no_grad()
def test_a_gated_network_is_that_of_its_formulas(activation: str, changes: dict) -> None:
    """Pre-RMSNorm, grouped heads whose size does not follow from the width, gated units."""
    backbone = Backbone(head_size=20, activation=activation, **changes)
    layer = Layer(Attention(4, 2), FeedForward((NEURONS,)))
    model, tokens = randomised(Transformer(network(backbone, layer, layer), 23)), tokens_of()
    stack = model.get_submodule("stacks.decoder")
    x = stack.embedding(tokens)
    for own in model.layers:
        a, f = own.attention, own.feed_forward
        h = nn.functional.rms_norm(x, (WIDTH,), own.attention_norm.weight, 1e-6)

        def heads(weight: Tensor, bias: Tensor | None, h: Tensor = h) -> Tensor:
            return F.linear(h, weight, bias).unflatten(-1, (-1, 20)).transpose(1, 2)

        q, k, v = heads(a.q, a.q_bias), heads(a.k, a.k_bias), heads(a.v, a.v_bias)
        if backbone.positions == "rotary":
            q, k = (rotated(part, backbone.rotary_base, backbone.rotary_size) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + mixed.transpose(1, 2).flatten(2) @ a.o.T
        h = nn.functional.rms_norm(x, (WIDTH,), own.feed_forward_norm.weight, 1e-6)
        x = x + (GATES[activation](h @ f.gate.T) * (h @ f.up.T)) @ f.down
    x = nn.functional.rms_norm(x, (WIDTH,), stack.norm.weight, 1e-6)
    expected = x @ (stack.embedding.weight if backbone.tied else model.output).T
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- slices


@st.composite
def backbones(draw: st.DrawFn) -> Backbone:
    activation = draw(st.sampled_from(sorted(GATED)))
    positions = draw(st.sampled_from(["rotary", "learned", "none"]))
    return Backbone(
        head_size=draw(st.sampled_from([16, 20])),
        activation=activation,
        norm=draw(st.sampled_from(["rms", "layer"])),
        norm_place=draw(st.sampled_from(["pre", "post"])),
        embedding_norm=draw(st.booleans()),
        positions=positions,
        max_positions=12 if positions == "learned" else None,
        biases=draw(st.sampled_from(["none", "qkv"] if GATED[activation] else ["none", "qkv", "all"])),
        tied=draw(st.booleans()),
    )


def on(backbone: Backbone, architecture: Architecture, causal: bool) -> Architecture:
    return replace(architecture, backbone=backbone, decoder=replace(architecture.decoder, causal=causal))


@pytest.mark.parametrize("sharing", ["nested", "packed"])
@given(backbone=backbones(), seed=st.integers(0, 10**6), causal=st.booleans())
def test_a_slice_on_any_backbone_is_its_extracted_model(sharing, backbone: Backbone, seed: int, causal: bool) -> None:
    supernet = randomised(Transformer(on(backbone, SPACE.envelope, causal), 23, sharing))
    member = on(backbone, SPACE.sample_balanced(Random(seed)), causal)
    tokens = tokens_of(seed=seed)
    logits, extracted = supernet(tokens, member), supernet.extract(member)
    torch.testing.assert_close(logits, extracted(tokens), rtol=1e-4, atol=1e-4)
    logits.log_softmax(-1)[..., 0].sum().backward()
    regions = supernet.where(member)
    for name, parameter in supernet.named_parameters():
        assert (parameter.grad is not None) == (name in regions), name
        if parameter.grad is not None:
            inside = parameter.grad.clone()
            region = regions[name]
            for start, stop in region.rows:
                inside[start:stop, ...] = 0 if region.columns is None else inside[start:stop]
                if region.columns is not None:
                    inside[start:stop, : region.columns] = 0
            assert not inside.any(), f"{name} has a gradient outside its region"


def test_a_sequence_longer_than_learned_positions_is_one_message() -> None:
    model = Transformer(network(Backbone(12, positions="learned", max_positions=5)), 23)
    with pytest.raises(MoesaicError, match="longer than the learned positions reach"):
        model(tokens_of(length=6))


# ---------------------------------------------------------------- padding

SIDES = {
    "right": lambda lengths, width: [(0, length) for length in lengths],
    "left": lambda lengths, width: [(width - length, width) for length in lengths],
    "both": lambda lengths, width: [((width - length) // 2, (width - length) // 2 + length) for length in lengths],
}
PADDED = {
    "rotary": Backbone(12),
    "learned": Backbone(12, "gelu", "layer", positions="learned", max_positions=12, biases="all"),
    "post": Backbone(12, "gelu", "layer", "post", embedding_norm=True, positions="learned", max_positions=12),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backbone", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_padding_changes_no_logit_and_is_not_routed(side: str, backbone: Backbone, causal: bool) -> None:
    model = randomised(Transformer(network(backbone, SPARSE, DENSE, causal=causal), 23))
    lengths, width = [9, 4, 1, 0], 9
    tokens, mask = tokens_of(4, width), torch.zeros(4, width, dtype=torch.bool)
    places = SIDES[side](lengths, width)
    for row, (start, stop) in enumerate(places):
        mask[row, start:stop] = True
    output = model.run(tokens, mask=mask)
    assert output.logits.isfinite().all()
    routing = output.routings[0]
    assert routing is not None
    assert len(routing.probabilities) == sum(lengths)
    for row, (start, stop) in enumerate(places):
        if stop > start:
            alone = model(tokens[row : row + 1, start:stop])
            torch.testing.assert_close(output.logits[row, start:stop], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backbone", [PADDED["rotary"], PADDED["learned"]], ids=["rotary", "learned"])
@torch.no_grad()
def test_prompts_padded_on_the_left_are_continued_as_if_alone(backbone: Backbone) -> None:
    architecture = network(backbone, SPARSE, DENSE)
    model, lengths, width = randomised(Transformer(architecture, 23)), [5, 2], 5
    tokens, following = tokens_of(2, width), tokens_of(2, 3, seed=1)
    mask = torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]
    cache = KeyValueCache(architecture, 2, width + 3)
    model.run(tokens, cache=cache, mask=mask)
    found = torch.cat([model.run(following[:, i : i + 1], cache=cache).logits for i in range(3)], 1)
    for row, length in enumerate(lengths):
        whole = torch.cat([tokens[row, width - length :], following[row]])[None]
        torch.testing.assert_close(found[row], model(whole)[0, length:], rtol=1e-3, atol=1e-4)
