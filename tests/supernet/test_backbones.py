"""Every kind of backbone against torch's own modules, and slices of it against extracted models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward, Layer, MoesaicError, Stack
from moesaic.supernet import Transformer
from moesaic.supernet.stack import TransformerLayer
from tests.supernet.network_tools import (
    HEADS,
    LENGTH,
    NEURONS,
    SPACE,
    WIDTH,
    backbones,
    network,
    on,
    randomised,
    tokens_of,
)

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
def test_a_network_with_layer_norm_matches_torch(activation, function, norm_place, biases, causal) -> None:
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
def test_a_gated_network_matches_its_formulas(activation: str, changes: dict) -> None:
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


def must_learn(name: str, backbone: Backbone) -> bool:
    """Whether a random loss gives a parameter that is used a gradient that is not zero.

    A bias of all keys shifts all scores of a query alike, which softmax does not see, unless positions turn it.
    """
    return not name.endswith("k_bias") or backbone.positions == "rotary"


@pytest.mark.parametrize("sharing", ["nested", "packed"])
@given(backbone=backbones(), seed=st.integers(0, 10**6), causal=st.booleans())
def test_a_slice_on_any_backbone_is_its_extracted_model(sharing, backbone: Backbone, seed: int, causal: bool) -> None:
    """In logits and in gradients, which are zero outside the regions that ``where`` names."""
    supernet = randomised(Transformer(on(backbone, SPACE.envelope, causal), 23, sharing))
    member = on(backbone, SPACE.sample_balanced(Random(seed)), causal)
    tokens, regions = tokens_of(seed=seed), supernet.where(member)
    extracted = supernet.extract(member)
    logits, expected = supernet(tokens, member), extracted(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for found in (logits, expected):
        found.log_softmax(-1)[..., 0].sum().backward()
    gradients = {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}
    assert gradients.keys() == regions.keys() == dict(extracted.named_parameters()).keys()
    for name, parameter in extracted.named_parameters():
        assert parameter.grad is not None
        inside = regions[name].of(gradients[name])
        scale = max(float(parameter.grad.norm()), 1e-3)
        assert float((inside - parameter.grad).norm()) <= 1e-3 * scale, name
        assert inside.count_nonzero() == gradients[name].count_nonzero(), f"{name} has a gradient outside its region"
        if must_learn(name, backbone):
            assert inside.norm() > 1e-4, f"{name} learns nothing"


@given(one=backbones(), other=backbones())
def test_a_slice_on_another_backbone_is_refused(one: Backbone, other: Backbone) -> None:
    assume(one != other)
    with torch.device("meta"):
        supernet = Transformer(on(one, SPACE.envelope), 23)
    assert supernet.where(on(one, SPACE.smallest))
    with pytest.raises(MoesaicError, match="does not fit this model: backbone"):
        supernet.where(on(other, SPACE.smallest))


@pytest.mark.parametrize("name", [key.name for key in fields(Backbone)])
def test_every_choice_of_a_backbone_is_distinguished(name: str) -> None:
    others = {
        "head_size": 64, "activation": "geglu", "norm": "layer", "norm_place": "post", "norm_eps": 1e-5,
        "embedding_norm": True, "positions": "none", "rotary_base": 20.0, "rotary_fraction": 0.5, "max_positions": 9,
        "biases": "qkv", "head": "none", "tied": False, "qk_norm": "head", "shared_gate": True,
        "qkv_width": 32,
    }  # fmt: skip
    bases = {"max_positions": {"positions": "learned", "max_positions": 8}, "qkv_width": {"positions": "none"}}
    one = Backbone(**bases.get(name, {}))
    alike = Architecture(Stack(32, (Layer(Attention(2, 2), FeedForward((64,))),)))
    with torch.device("meta"):
        supernet = Transformer(on(one, alike), 23)
    with pytest.raises(MoesaicError, match="does not fit this model: backbone"):
        supernet.where(on(replace(one, **{name: others[name]}), alike))


def test_a_sequence_longer_than_learned_positions_is_one_message() -> None:
    model = Transformer(network(Backbone(12, positions="learned", max_positions=5)), 23)
    with pytest.raises(MoesaicError, match="longer than the learned positions reach"):
        model(tokens_of(length=6))
