"""How sparse a trained layer's activations are, and how much of them its router finds.

Shapes: T tokens, N neurons, D width, E experts, G tiles of neurons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.search_spaces import FeedForward, Slot
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.sparsify.neurons import contributions, hidden
from moesaic.supernet.sparsify.routers import masses

_MASS = 0.95
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
"""Shares of the tiles for which ``captured`` says how much of the mass is in those that a router chooses."""


@dataclass(frozen=True)
class Activity:
    """Of a dense layer, means over tokens: ``concentrated`` is the share of its neurons that hold 95 % of the squared
    contributions to the output, ``small`` that of neurons below 1 % of the token's largest, ``negative`` that of
    negative pre-activations of the nonlinearity, which a ReLU would make 0.

    Of a mixture, ``concentrated`` is the share of the experts that take 95 % of the tokens; the others are None.
    """

    concentrated: float
    small: float | None = None
    negative: float | None = None


@dataclass(frozen=True)
class Captured:
    """Of a dense layer that was split: the share of the activation mass in the tiles that the router chooses for each
    token, where it chooses a ``share`` of them, and in the ``best`` ones; means over the tokens' masses."""

    share: float
    routed: float
    best: float


@dataclass(frozen=True)
class LayerActivity:
    """``captured`` is empty for a layer that was not dense, or has one tile."""

    slot: Slot
    activity: Activity
    captured: tuple[Captured, ...] = ()


@torch.no_grad()
def captured(layer: SparseFeedForward, read: Tensor) -> tuple[Captured, ...]:
    """For a layer whose bank is split into tiles, and what it reads, [T, D]."""
    tiles, size, router = layer.part.experts, layer.part.expert_sizes[0], layer.part.router
    assert router is not None
    mass = masses(contributions(hidden(layer, read), layer.down), size)  # [T, G]
    total, ranked = mass.sum(), mass.sort(1, descending=True).values.cumsum(1).sum(0)
    found = []
    for share in SHARES:
        count = max(1, round(share * tiles))
        routing = layer.route(read, FeedForward((size,) * tiles, replace(router, k=count)))
        experts = torch.arange(tiles, device=read.device).repeat_interleave(routing.offsets.diff())
        routed = mass[routing.tokens, experts].sum()
        found.append(Captured(share, (routed / total).item(), (ranked[count - 1] / total).item()))
    return tuple(found)


@torch.no_grad()
def activity(layer: SparseFeedForward, part: FeedForward, read: Tensor) -> Activity:
    """For what the layer reads, [T, D]."""
    if part.router is not None:
        load = layer.route(read, part).load.double()
        return Activity(_holding((load / load.sum())[None]))
    values = hidden(layer, read)
    before = F.linear(read, layer.up if layer.gate is None else layer.gate, layer.up_bias)
    squares = contributions(values, layer.down).square()
    largest = values.abs().amax(1, keepdim=True)
    return Activity(
        _holding(squares),
        (values.abs() < 0.01 * largest).float().mean().item(),
        (before < 0).float().mean().item(),
    )


def _holding(values: Tensor) -> float:
    """Mean over rows of the share of columns, the largest first, that hold ``_MASS`` of the row's sum."""
    sums = values.sort(-1, descending=True).values.cumsum(-1)
    needed = (sums < _MASS * sums[:, -1:]).sum(-1) + 1
    return (needed.float().mean() / values.shape[1]).item()
