"""Grouped-query attention to a token's own sequence or to an encoder's states, computed with a slice of its weights.

Shapes: B sequences, S query positions, P key positions, D width, H heads, K key/value heads, C head size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.search_spaces import Attention, Backbone, CrossAttention
from moesaic.supernet.batch import Inputs
from moesaic.supernet.regions import Region
from moesaic.supernet.tables import kept


class SelfAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), rotary positions (arXiv 2104.09864), biases of the backbone.

    ``read_width`` is the width of what keys and values are made of: that of the layer, except in cross-attention.
    """

    def __init__(
        self, width: int, attention: Attention | CrossAttention, backbone: Backbone, read_width: int | None = None
    ):
        super().__init__()
        self.attention, self.backbone = attention, backbone
        self.width, self.read_width = width, width if read_width is None else read_width
        rows, kv_rows = backbone.widths(attention)
        self.q = nn.Parameter(torch.empty(rows, width))
        self.k = nn.Parameter(torch.empty(kv_rows, self.read_width))
        self.v = nn.Parameter(torch.empty(kv_rows, self.read_width))
        self.o = nn.Parameter(torch.empty(width, rows))

        def bias(size: int, there: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(size)) if there else None

        reads, writes = backbone.biases != "none", backbone.biases == "all"
        self.q_bias, self.k_bias, self.v_bias = bias(rows, reads), bias(kv_rows, reads), bias(kv_rows, reads)
        self.o_bias = bias(width, writes)
        normed = {"none": (0, 0), "head": (backbone.head_size,) * 2, "all": (rows, kv_rows)}[backbone.qk_norm]
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(size)) if size else None for size in normed)

    def initialise(self, write_std: float) -> None:
        """Weights that read the residual stream get standard deviation 1 / sqrt(D), those that write ``write_std``."""
        for weight in (self.q, self.k, self.v):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.normal_(self.o, std=write_std)
        for bias in (self.q_bias, self.k_bias, self.v_bias, self.o_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def where(
        self, width: int, attention: Attention | CrossAttention, read_width: int | None = None
    ) -> dict[str, Region]:
        """The region of each parameter that ``attention`` at ``width`` uses: its first heads of each kind.

        Raises
        ------
        ValueError : a width or a number of heads exceeds this module's.
        """
        mine, reads = self.attention, width if read_width is None else read_width
        exceeds = width > self.width or reads > self.read_width
        if exceeds or attention.heads > mine.heads or attention.kv_heads > mine.kv_heads:
            raise ValueError(
                f"{attention} of width {width} that reads width {reads} exceeds {mine} of width {self.width} that "
                f"reads {self.read_width}"
            )
        return _regions(width, reads, attention, self.backbone)

    def forward(self, x: Tensor, attention: Attention, inputs: Inputs) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        at = self.where(x.shape[-1], attention)
        return self._output(self._mixed(x, attention, at, inputs), at)

    def mixed(self, x: Tensor, inputs: Inputs) -> Tensor:
        """[B, S, D] to [B, S, H C]: what the output weights read, all heads one after the other."""
        assert isinstance(self.attention, Attention)
        return self._mixed(x, self.attention, self.where(self.width, self.attention), inputs)

    def _output(self, mixed: Tensor, at: dict[str, Region]) -> Tensor:
        bias = None if self.o_bias is None else at["o_bias"].of(self.o_bias)
        return F.linear(mixed, at["o"].of(self.o), bias)

    def _queries(self, x: Tensor, heads: int, at: dict[str, Region]) -> Tensor:
        """[B, S, D] to [B, H, S, C]."""
        return self._heads(x, heads, at, "q", self.q, self.q_bias, self.q_norm)

    def _keys_and_values(self, x: Tensor, heads: int, at: dict[str, Region]) -> tuple[Tensor, Tensor]:
        """[B, S, D] to [B, K, S, C] each."""
        keys = self._heads(x, heads, at, "k", self.k, self.k_bias, self.k_norm)
        return keys, self._heads(x, heads, at, "v", self.v, self.v_bias)

    def _heads(
        self,
        x: Tensor,
        heads: int,
        at: dict[str, Region],
        name: str,
        weight: Tensor,
        bias: Tensor | None,
        norm: Tensor | None = None,
    ) -> Tensor:
        own = None if bias is None else at[f"{name}_bias"].of(bias)
        projected = F.linear(x, at[name].of(weight), own)
        if norm is not None:
            projected = self._normed(projected, at[f"{name}_norm"].of(norm))
        return projected.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _mixed(self, x: Tensor, attention: Attention, at: dict[str, Region], inputs: Inputs) -> Tensor:
        length, cache = x.shape[1], inputs.cache
        q = self._queries(x, attention.heads, at)
        k, v = self._keys_and_values(x, attention.kv_heads, at)
        if self.backbone.positions == "rotary":
            # One table for the whole cache, so that a decoding step looks its angles up.
            start, end = (0, length) if cache is None else (cache.length, cache.capacity)
            table = _angles(end, self.backbone.rotary_size, self.backbone.rotary_base, x.device)
            angles = tuple(part[start : start + length] for part in table)
            q, k = _rotate(q, angles), _rotate(k, angles)
        if cache is not None:
            k, v = cache.extended(k, v)
        return _mix(q, k, v, inputs).transpose(1, 2).flatten(2)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of [B, S, H * C], over as many values as ``weight`` has at a time."""
        apart = x.float().unflatten(-1, (-1, len(weight)))
        return F.rms_norm(apart, weight.shape, weight, self.backbone.norm_eps).flatten(2).to(x.dtype)


class EncoderAttention(SelfAttention):
    """Attention of a decoder's tokens to the states of an encoder's last layers, which have no order in it."""

    def cross(self, x: Tensor, attention: CrossAttention, inputs: Inputs) -> Tensor:
        """[B, S, D] to [B, S, D]. Of B = n * M rows, each n consecutive ones read one of the M sequences of
        ``inputs.memory``; in a cache, its keys and values are computed once."""
        memory, cache = inputs.memory, inputs.cache
        assert memory is not None
        at = self.where(x.shape[-1], attention, memory.width)
        if cache is not None and cache.crossed:
            k, v = cache.crossed
        else:
            k, v = self._keys_and_values(memory.last(attention.span), attention.kv_heads, at)
            if cache is not None:
                cache.crossed[:] = k, v
        together = x.reshape(len(k), -1, x.shape[-1])  # the rows that read one sequence
        q = self._queries(together, attention.heads, at)
        mixed = _attended(q, k, v, memory.seen(attention.span)).transpose(1, 2).flatten(2)
        return self._output(mixed, at).view_as(x)


def _attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of queries [M, H, S, C] to keys and values [M, K, P, C], at the positions ``seen`` [M, 1, 1, P]."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


@lru_cache(maxsize=4096)
def _regions(width: int, reads: int, attention: Attention | CrossAttention, backbone: Backbone) -> dict[str, Region]:
    head_size, biases = backbone.head_size, backbone.biases
    rows, kv_rows = backbone.widths(attention)
    regions = {"q": Region.first(rows, width), **dict.fromkeys(("k", "v"), Region.first(kv_rows, reads))}
    regions["o"] = Region.first(width, rows)
    if biases != "none":
        regions |= {"q_bias": Region.first(rows), **dict.fromkeys(("k_bias", "v_bias"), Region.first(kv_rows))}
    if biases == "all":
        regions["o_bias"] = Region.first(width)
    if backbone.qk_norm != "none":
        sizes = (head_size, head_size) if backbone.qk_norm == "head" else (rows, kv_rows)
        regions |= {name: Region.first(size) for name, size in zip(("q_norm", "k_norm"), sizes, strict=True)}
    return regions


def _mix(q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
    """Attention of queries [B, H, S, C] over keys and values [B, K, P, C]; [B, H, S, C]."""
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    if length == 1:
        # The queries of a group share a key head and see all positions: one product computes them without copies.
        grouped = q.reshape(len(q), k.shape[1], group, -1)
        mask = None if inputs.mask is None else _seen(inputs, 1, k.shape[2], q.device)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if inputs.mask is None and (not inputs.causal or length == k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=inputs.causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_seen(inputs, length, k.shape[2], q.device))


def _seen(inputs: Inputs, length: int, positions: int, device: torch.device) -> Tensor:
    """[1 or B, 1, S, P] whether each of the last S positions sees each of the P."""
    seen = torch.ones(1, 1, length, positions, dtype=torch.bool, device=device)
    if inputs.causal:
        seen = seen.tril(positions - length)
    if inputs.mask is not None:
        # Padding sees everything. Its states are not used, but a softmax over nothing would give NaN, which spreads.
        seen = seen & inputs.mask[:, None, None] | ~inputs.mask[:, None, -length:, None]
    return seen


def _rotate(x: Tensor, angles: tuple[Tensor, ...]) -> Tensor:
    """Rotate the pairs (i, i + R/2) of each head's first R values in [B, H, S, C] by the angles (cos, sin) [S, R/2] of
    its position."""
    cos, sin = angles
    size = 2 * cos.shape[-1]
    first, second = x[..., :size].chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), dim=-1)


@kept
def _angles(length: int, size: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, [S, R/2] each."""
    rate = base ** (-torch.arange(0, size, 2, device=device) / size)
    angle = torch.arange(length, device=device)[:, None] * rate
    return angle.cos(), angle.sin()
