"""Parts of a Transformer layer. Each holds weights for its largest use and computes with a slice of them.

Shapes: B sequences, S positions, T = B * S tokens, D width, H heads, K key/value heads, C head size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic import kernels
from moesaic.kernels import Bank, ExpertLayout, Routing
from moesaic.search_spaces import Attention, Backbone, FeedForward
from moesaic.supernet.cache import LayerCache
from moesaic.supernet.sharing import Sharing, expert_layout


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) over however many features come in."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        return F.rms_norm(x, (width,), self.weight[:width], eps=1e-6)


class SelfAttention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) with rotary positions (arXiv 2104.09864)."""

    def __init__(self, width: int, attention: Attention, backbone: Backbone):
        super().__init__()
        self.head_size = backbone.head_size
        self.q = nn.Parameter(torch.empty(attention.heads * self.head_size, width))
        self.k = nn.Parameter(torch.empty(attention.kv_heads * self.head_size, width))
        self.v = nn.Parameter(torch.empty(attention.kv_heads * self.head_size, width))
        self.o = nn.Parameter(torch.empty(width, attention.heads * self.head_size))

    def forward(self, x: Tensor, attention: Attention, cache: LayerCache | None = None) -> Tensor:
        """[B, S, D] to [B, S, D] with the first heads of each kind; with ``cache``, after the positions it holds."""
        batch, length, width = x.shape
        head_size, rows, kv_rows = self.head_size, attention.heads * self.head_size, attention.kv_heads * self.head_size

        def heads(weight: Tensor, rows: int) -> Tensor:
            return F.linear(x, weight[:rows, :width]).view(batch, length, -1, head_size).transpose(1, 2)

        q, k, v = heads(self.q, rows), heads(self.k, kv_rows), heads(self.v, kv_rows)  # [B, H or K, S, C]
        # One table for all lengths of a cache, so that a step of decoding looks its angles up.
        start, end = (0, length) if cache is None else (cache.length, cache.capacity)
        angles = tuple(part[start : start + length] for part in _angles(end, head_size, x.device))
        q, k = _rotate(q, angles), _rotate(k, angles)
        if cache is not None:
            k, v = cache.extended(k, v)
        group = attention.heads // attention.kv_heads
        if length == 1:
            # The queries of a group see one head and all positions: rows of one product, for which nothing is copied.
            mixed = F.scaled_dot_product_attention(q.reshape(batch, -1, group, head_size), k, v).view_as(q)
        else:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            mixed = _attend(q, k, v)
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, rows), self.o[:width, :rows])


class SparseFeedForward(nn.Module):
    """One bank of neurons, an optional router, and whichever experts an architecture cuts out of them."""

    def __init__(self, width: int, part: FeedForward, backbone: Backbone, sharing: Sharing):
        super().__init__()
        self.part, self.backbone, self.sharing = part, backbone, sharing
        self.up = nn.Parameter(torch.empty(part.neurons, width))
        self.gate = nn.Parameter(torch.empty(part.neurons, width)) if backbone.activation == "swiglu" else None
        self.down = nn.Parameter(torch.empty(part.neurons, width))
        self.router = nn.Parameter(torch.empty(part.experts, width)) if part.experts > 1 else None

    def forward(self, x: Tensor, part: FeedForward) -> tuple[Tensor, Routing | None]:
        """[T, D] to [T, D], and where the tokens went (None for a dense layer)."""
        routing = self.route(x, part) if part.router else None
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        layout = expert_layout(self.part, part, self.sharing)
        out = self._experts(x, layout, routing)
        if part.shared_size:
            out = out + self._experts(x, ExpertLayout((0,), (part.shared_size,)), None)
        return out, routing

    def route(self, x: Tensor, part: FeedForward) -> Routing:
        """Router logits in float32 whatever the rest computes in: a rounded tie would send a token elsewhere."""
        assert self.router is not None and part.router is not None
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router[: part.experts, : x.shape[1]].float())
        return kernels.route(
            logits,
            most=part.router.most,
            threshold=part.router.threshold,
            normalise=self.backbone.router_weights == "sum",
        )

    def _experts(self, x: Tensor, layout: ExpertLayout, routing: Routing | None) -> Tensor:
        bank = Bank(self.up, self.gate, self.down)
        return kernels.sparse_ffn(x, bank, layout, routing, self.backbone.activation)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last S of P positions, q [B, H, S, C], to all of them, k and v [B, H, P, C]."""
    length, positions = q.shape[2], k.shape[2]
    if length == positions:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.ones(length, positions, dtype=torch.bool, device=q.device).tril(positions - length)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def _rotate(x: Tensor, angles: tuple[Tensor, ...]) -> Tensor:
    """Turn the pairs (i, i + C/2) of [B, H, S, C] by their position's angles, cos and sin [S, C/2]."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@lru_cache(maxsize=32)
def _angles(length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [S, C/2]; base 10,000 as published."""
    with torch.inference_mode(False):  # the cached tensors must also serve a training step
        rate = 10_000.0 ** (-torch.arange(0, head_size, 2, device=device) / head_size)
        angle = torch.arange(length, device=device)[:, None] * rate
        return angle.cos(), angle.sin()
