"""How sparse a trained layer's activations are, before anything is changed.

Shapes: T tokens, N neurons, D width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.search_spaces import FeedForward
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.sparsify.neurons import contributions, hidden

_MASS = 0.95


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
