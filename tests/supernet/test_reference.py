"""Any network on any backbone against its formulas: one sequence, one head, one token and one expert at a time."""

from __future__ import annotations

import cmath
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moesaic.search_spaces import Architecture, Attention, Backbone, FeedForward
from moesaic.supernet import Transformer
from moesaic.supernet.attention import SelfAttention
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.norms import Norm
from tests.supernet.network_tools import networks, randomised, tokens_of


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: Tensor) -> Tensor:
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


PLAIN = {"relu": lambda x: x.clamp(min=0), "gelu": gelu, "gelu_tanh": gelu_tanh}
GATES = {"swiglu": silu, "geglu": gelu, "geglu_tanh": gelu_tanh}


def normed(x: Tensor, own: Norm, backbone: Backbone) -> Tensor:
    kind = nn.LayerNorm if backbone.norm == "layer" else nn.RMSNorm
    plain = kind(x.shape[-1], backbone.norm_eps)
    plain.load_state_dict(own.state_dict())
    return plain(x)


def scaled(x: Tensor, weight: Tensor, backbone: Backbone) -> Tensor:
    """RMSNorm over the last dimension."""
    return weight * x / (x.square().mean(-1, keepdim=True) + backbone.norm_eps).sqrt()


def turned(x: Tensor, backbone: Backbone) -> Tensor:
    """[S, C] with the first values of position m multiplied by exp(i m base^(-2j/R)), as complex numbers."""
    size = int(backbone.head_size * backbone.rotary_fraction)
    numbers = torch.complex(x[:, : size // 2].double(), x[:, size // 2 : size].double())
    for position in range(len(x)):
        for j in range(size // 2):
            numbers[position, j] *= cmath.exp(1j * position * backbone.rotary_base ** (-2 * j / size))
    return torch.cat([numbers.real.float(), numbers.imag.float(), x[:, size:]], -1)


def attended(x: Tensor, own: SelfAttention, backbone: Backbone, attention: Attention, causal: bool) -> Tensor:
    size, length = backbone.head_size, len(x)
    q, k, v = (
        nn.functional.linear(x, weight, bias)
        for weight, bias in ((own.q, own.q_bias), (own.k, own.k_bias), (own.v, own.v_bias))
    )
    if backbone.qk_norm == "all":
        q, k = scaled(q, own.q_norm, backbone), scaled(k, own.k_norm, backbone)
    q, k, v = (part.unflatten(-1, (-1, size)).transpose(0, 1) for part in (q, k, v))
    heads = []
    for head in range(attention.heads):
        shared = head * attention.kv_heads // attention.heads
        query, key = q[head], k[shared]
        if backbone.qk_norm == "head":
            query, key = scaled(query, own.q_norm, backbone), scaled(key, own.k_norm, backbone)
        if backbone.positions == "rotary":
            query, key = turned(query, backbone), turned(key, backbone)
        scores = query @ key.T / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.arange(length)[None] > torch.arange(length)[:, None], -math.inf)
        heads.append(scores.softmax(-1) @ v[shared])
    return nn.functional.linear(torch.cat(heads, -1), own.o, own.o_bias)


def chosen(shares: list[float], part: FeedForward) -> dict[int, float]:
    """The experts of a token and their weights, from the probabilities of all."""
    router = part.router
    assert router is not None
    ranking = sorted(range(len(shares)), key=lambda expert: -shares[expert])
    if router.kind == "top_k":
        kept = ranking[: router.k]
    else:
        ahead = [sum(shares[expert] for expert in ranking[:rank]) for rank in range(len(ranking))]
        kept = [expert for expert, mass in zip(ranking, ahead, strict=True) if mass < router.threshold]
        kept = kept[: router.max_k]
    if router.weights == "one":
        return dict.fromkeys(kept, 1.0)
    total = sum(shares[expert] for expert in kept) if router.weights == "sum" else 1.0
    return {expert: shares[expert] / total for expert in kept}


def fed(x: Tensor, own: SparseFeedForward, backbone: Backbone, part: FeedForward) -> Tensor:
    def neurons(token: Tensor, start: int, size: int) -> Tensor:
        rows = slice(start, start + size)
        hidden = own.up[rows] @ token
        if own.up_bias is not None:
            hidden = hidden + own.up_bias[rows]
        if own.gate is None:
            hidden = PLAIN[backbone.activation](hidden)
        else:
            hidden = hidden * GATES[backbone.activation](own.gate[rows] @ token)
        return hidden @ own.down[rows]

    starts = [part.shared_size + sum(part.expert_sizes[:expert]) for expert in range(part.experts)]
    outs = []
    for token in x:
        weights = {0: 1.0}
        if part.router is not None:
            assert own.router is not None
            logits = own.router @ token
            if part.router.predicts_mass:
                masses = logits + own.router_bias
                if part.router.score == "mlp":
                    hidden = own.router_in @ token + own.router_in_bias
                    masses = masses + own.router_out @ (hidden * torch.sigmoid(hidden))
                masses = masses.relu()
                shares = masses / masses.sum() if masses.any() else torch.full_like(masses, 1 / len(masses))
            else:
                shares = logits.softmax(0)
            weights = chosen(shares.tolist(), part)
        out = sum(w * neurons(token, starts[e], part.expert_sizes[e]) for e, w in weights.items())
        if part.shared_size:
            share = torch.sigmoid(own.shared_gate @ token) if backbone.shared_gate else 1
            out = out + share * neurons(token, 0, part.shared_size)
        outs.append(out if own.down_bias is None else out + own.down_bias)
    return torch.stack(outs)


def reference(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits [S, V] of one sequence [S]."""
    architecture = model.architecture
    backbone, causal = architecture.backbone, architecture.decoder.causal
    stack = model.get_submodule("stacks.decoder")
    x = stack.embedding.weight[tokens]
    if backbone.positions == "learned":
        x = x + stack.positions.weight[: len(tokens)]
    if backbone.embedding_norm:
        x = normed(x, stack.embedding_norm, backbone)
    for own, layer in zip(stack.layers, architecture.decoder.layers, strict=True):
        if backbone.norm_place == "pre":
            x = x + attended(normed(x, own.attention_norm, backbone), own.attention, backbone, layer.attention, causal)
            x = x + fed(normed(x, own.feed_forward_norm, backbone), own.feed_forward, backbone, layer.feed_forward)
        else:
            x = normed(x + attended(x, own.attention, backbone, layer.attention, causal), own.attention_norm, backbone)
            x = normed(x + fed(x, own.feed_forward, backbone, layer.feed_forward), own.feed_forward_norm, backbone)
    if backbone.norm_place == "pre":
        x = normed(x, stack.norm, backbone)
    if backbone.head == "none":
        return x
    if backbone.head == "masked":
        hidden = PLAIN[backbone.activation](x @ model.head.dense.T + model.head.dense_bias)
        x = normed(hidden, model.head.norm, backbone)
    logits = x @ (stack.embedding.weight if backbone.tied else model.output).T
    return logits + model.head.bias if backbone.head == "masked" else logits


@settings(max_examples=150)
@given(architecture=networks(), seed=st.integers(0, 10**6))
@torch.no_grad()
def test_a_network_matches_its_formulas(architecture: Architecture, seed: int) -> None:
    model, tokens = randomised(Transformer(architecture, 23), seed), tokens_of(2, 5, seed)
    found = model(tokens)
    assert found.std() > 0.05  # the logits say something
    torch.testing.assert_close(found, torch.stack([reference(model, row) for row in tokens]), rtol=1e-3, atol=1e-4)
