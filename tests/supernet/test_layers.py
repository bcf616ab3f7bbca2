from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from moesaic import kernels
from moesaic.search_spaces import Attention, Backbone, FeedForward, Router
from moesaic.supernet.attention import SelfAttention, _angles, _rotate
from moesaic.supernet.batch import Inputs
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.norms import Norm


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module: torch.nn.Module, scale: float) -> torch.nn.Module:
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed) * scale)
    return module


def test_rms_norm_divides_by_the_root_of_the_mean_square_of_the_features_it_gets() -> None:
    norm = Norm(8, Backbone())
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1, 9))
    x = randn(3, 5) * 10
    expected = [[v * (i + 1) / math.sqrt(sum(u * u for u in row) / 5 + 1e-6) for i, v in enumerate(row)]
                for row in x.tolist()]  # fmt: skip
    torch.testing.assert_close(norm(x), torch.tensor(expected))


def test_rms_norm_does_not_depend_on_the_scale_of_its_input() -> None:
    x = randn(3, 8)
    torch.testing.assert_close(Norm(8, Backbone())(x * 1000), Norm(8, Backbone())(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- attention


def turned(vector: list[float], position: int) -> list[float]:
    """Rotary positions with complex numbers: position m turns the pair (i, i + C/2) by m * 10000^(-2i/C)."""
    half = len(vector) // 2
    numbers = [
        complex(vector[i], vector[i + half]) * cmath.exp(1j * position * 10_000 ** (-2 * i / len(vector)))
        for i in range(half)
    ]
    return [n.real for n in numbers] + [n.imag for n in numbers]


def test_rotation_rotates_pairs_by_the_angles_of_their_position() -> None:
    x = randn(2, 3, 6, 8)
    expected = [[[turned(v, m) for m, v in enumerate(head)] for head in row] for row in x.tolist()]
    torch.testing.assert_close(
        _rotate(x, _angles(6, 8, 10_000.0, x.device)), torch.tensor(expected), rtol=1e-5, atol=1e-5
    )


def test_scores_depend_only_on_the_distance_of_two_positions() -> None:
    q, k = randn(8, seed=1).expand(1, 1, 20, 8), randn(8, seed=2).expand(1, 1, 20, 8)
    angles = _angles(20, 8, 10_000.0, q.device)
    scores = (_rotate(q, angles) @ _rotate(k, angles).transpose(-1, -2))[0, 0]
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert scores[0].std() > 0.1  # and they do depend on it


def naive_attention(module: SelfAttention, x: Tensor, attention: Attention) -> Tensor:
    """Head by head and position by position, with the heads of a group told one by one."""
    length, width = x.shape
    size = module.backbone.head_size
    out = torch.zeros(length, width)
    for head in range(attention.heads):
        shared = head // (attention.heads // attention.kv_heads)
        rows, kv_rows = slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)
        q = torch.tensor([turned(v, m) for m, v in enumerate((x @ module.q[rows, :width].T).tolist())])
        k = torch.tensor([turned(v, m) for m, v in enumerate((x @ module.k[kv_rows, :width].T).tolist())])
        v = x @ module.v[kv_rows, :width].T
        for m in range(length):
            shares = torch.stack([q[m] @ k[n] / size**0.5 for n in range(m + 1)]).softmax(0)
            mixed = sum((share * v[n] for n, share in enumerate(shares)), torch.zeros(size))
            out[m] += module.o[:width, rows] @ mixed
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (2, 2), (2, 1), (3, 1), (1, 1)])
@pytest.mark.parametrize("width", [16, 24])
@torch.no_grad()
def test_grouped_query_attention_is_that_of_repeated_heads(heads: int, kv_heads: int, width: int) -> None:
    module = filled(SelfAttention(24, Attention(4, 4), Backbone(head_size=8)), 0.3)
    assert isinstance(module, SelfAttention)
    x, attention = randn(2, 6, width, seed=9), Attention(heads, kv_heads)
    expected = torch.stack([naive_attention(module, row, attention) for row in x])
    torch.testing.assert_close(module(x, attention, Inputs()), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_does_not_depend_on_absolute_positions() -> None:
    """The layer has no absolute positions: a sequence that begins later gives the same outputs, later."""
    module = filled(SelfAttention(16, Attention(2, 1), Backbone(head_size=8)), 0.3)
    x = randn(1, 1, 16).expand(1, 9, 16)
    out = module(x, Attention(2, 1), Inputs())
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- feed-forward


def sparse(part: FeedForward, backbone: Backbone | None = None) -> SparseFeedForward:
    module = filled(SparseFeedForward(16, part, backbone or Backbone(activation="gelu"), "nested"), 0.5)
    assert isinstance(module, SparseFeedForward)
    return module


@torch.no_grad()
def test_shared_expert_is_added_with_weight_one() -> None:
    module = sparse(FeedForward((32, 16), Router("top_k", k=1), 16))
    x = randn(7, 16)
    part = FeedForward((32, 16), Router("top_k", k=1))
    routed, _ = module(x, part)
    both, _ = module(x, FeedForward((32, 16), Router("top_k", k=1), 16))
    shared = torch.nn.functional.gelu(x @ module.up[:16].T) @ module.down[:16]
    torch.testing.assert_close(both, routed + shared)


@torch.no_grad()
def test_a_layer_is_its_experts_weighted_by_the_router() -> None:
    part = FeedForward((32, 16, 16), Router("threshold", threshold=0.7, max_k=2))
    module = sparse(part)
    x = randn(9, 16)
    out, routing = module(x, part)
    assert routing is not None
    starts = [0, 32, 48]
    for token, hidden in enumerate(x):
        shares = (module.router @ hidden).softmax(0)
        ranking = shares.argsort(descending=True).tolist()
        chosen = ranking[:1] if shares[ranking[0]] >= 0.7 else ranking[:2]
        expected = torch.zeros(16)
        for expert in chosen:
            rows = slice(starts[expert], starts[expert] + part.expert_sizes[expert])
            value = torch.nn.functional.gelu(module.up[rows] @ hidden) @ module.down[rows]
            expected += shares[expert] / sum(shares[e] for e in chosen) * value
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", [Router("top_k", k=2), Router("threshold", threshold=0.6, max_k=3)])
@torch.no_grad()
def test_routing_is_computed_in_float32_under_autocast(router: Router) -> None:
    part = FeedForward((16,) * 4, router)
    module = sparse(part)
    x = randn(64, 16)
    _, plain = module(x, part)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, mixed = module(x, part)
    assert out.dtype == torch.bfloat16
    assert plain is not None
    assert mixed is not None
    for name in ("tokens", "offsets", "weights", "probabilities"):
        assert torch.equal(getattr(plain, name), getattr(mixed, name))
    assert mixed.probabilities.dtype == mixed.weights.dtype == torch.float32
    rounded = (x.bfloat16() @ module.router.bfloat16().T).float().softmax(-1)
    assert not torch.equal(rounded, mixed.probabilities)  # bfloat16 logits would have differed


@torch.no_grad()
def test_implementations_are_interchangeable(monkeypatch: pytest.MonkeyPatch) -> None:
    part = FeedForward((32, 16), Router("top_k", k=1), 16)
    module = sparse(part)
    x = randn(20, 16)
    fast, _ = module(x, part)
    monkeypatch.setitem(kernels.IMPLEMENTATIONS, "torch", kernels.IMPLEMENTATIONS["reference"])
    torch.testing.assert_close(module(x, part)[0], fast)
