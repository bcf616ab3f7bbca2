"""Orders of a dense layer's neurons, so that its first rows are the important ones and its experts are runs of rows.

Shapes: T tokens, N neurons, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moesaic.kernels.reference import activate
from moesaic.search_spaces.parts import TILE
from moesaic.supernet.experts import SparseFeedForward

_ROUNDS = 6
_SPECTRUM = 64
"""Singular vectors that describe which neurons act together."""
_COARSE = 4
"""Tiles of a coarse cluster, so that larger experts also consist of neurons that act together."""
_ASSIGNED = 2048
"""Most neurons that are assigned at once: the exact assignment takes the cube of their number."""


def hidden(layer: SparseFeedForward, read: Tensor, rows: slice = slice(None)) -> Tensor:
    """[T, n] hidden values of the neurons ``rows`` for what the layer reads, [T, D]."""
    up = F.linear(read, layer.up[rows], None if layer.up_bias is None else layer.up_bias[rows])
    return activate(up, None if layer.gate is None else F.linear(read, layer.gate[rows]), layer.activation)


def contributions(hidden: Tensor, down: Tensor) -> Tensor:
    """[T, N] the norm of what each neuron adds to the output: |h| times the norm of its row of ``down`` [N, D]."""
    return hidden.abs() * down.norm(dim=1)


def importance(contribution: Tensor) -> Tensor:
    """[N] mean square of ``contributions`` over the tokens."""
    return contribution.square().mean(0)


def _together(layer: SparseFeedForward, contribution: Tensor) -> Tensor:
    """Neurons as points, near where they contribute to the same tokens: the leading singular vectors of contributions
    that are scaled to an equal mean square (MoEfication's co-activation graph, arXiv 2110.01786, by its spectrum)."""
    scaled = contribution / contribution.square().mean(0).sqrt().clamp(min=1e-12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the decomposition draws random directions
        _, values, vectors = torch.svd_lowrank(scaled, q=min(_SPECTRUM, *scaled.shape))
    return vectors * values


def _weights(layer: SparseFeedForward, contribution: Tensor) -> Tensor:
    """Neurons as points, near where their input weights are alike (MoEfication's parameter clustering)."""
    return (layer.up if layer.gate is None else layer.gate).detach()


CLUSTERS: dict[str, Callable[[SparseFeedForward, Tensor], Tensor] | None] = {
    "coactivation": _together,
    "weights": _weights,
    "none": None,
}
"""By name, what makes neurons neighbours inside a band of importance; ``none`` leaves the order of importance."""
STORED = "stored"
"""The order in which the model stores its neurons, which is that of chance: a control."""


def neuron_order(layer: SparseFeedForward, contribution: Tensor, bounds: Sequence[int], cluster: str) -> Tensor:
    """[N] neurons in their new order.

    Neurons fall by importance into bands that end at ``bounds``, so that the first rows up to any bound are the most
    important ones. Inside a band, neurons of one tile, and neighbouring tiles, are alike by ``CLUSTERS[cluster]``.
    ``STORED`` changes nothing.
    """
    if cluster == STORED:
        return torch.arange(contribution.shape[1], device=contribution.device)
    device, contribution = contribution.device, contribution.cpu()  # scipy assigns on a CPU
    ranked = importance(contribution).argsort(descending=True, stable=True)
    points = CLUSTERS[cluster]
    if points is None:
        return ranked.to(device)
    at = torch.nn.functional.normalize(points(layer, contribution).cpu(), dim=1)
    edges = sorted({0, len(ranked), *(bound for bound in bounds if 0 < bound < len(ranked))})
    bands = [ranked[first:stop] for start, end in pairwise(edges) for first, stop in _pieces(start, end)]
    return torch.cat([band[_clustered(at[band])] for band in bands]).to(device)


def _pieces(start: int, end: int) -> list[tuple[int, int]]:
    return [(first, min(first + _ASSIGNED, end)) for first in range(start, end, _ASSIGNED)]


def _clustered(points: Tensor) -> Tensor:
    """[n] an order in which neurons of a tile are neighbours, and so are the tiles of a coarse cluster."""
    coarse = TILE * _COARSE
    if len(points) % coarse or len(points) == coarse:
        return _balanced(points, TILE)
    order = _balanced(points, coarse)
    return torch.cat([cluster[_balanced(points[cluster], TILE)] for cluster in order.split(coarse)])


def _balanced(points: Tensor, size: int) -> Tensor:
    """[n] an order whose runs of ``size`` are the clusters of a k-means with clusters of equal size.

    Each round assigns all points to the places of the clusters at the least sum of squared distances.
    """
    count = len(points) // size
    if count < 2:
        return torch.arange(len(points))
    centres = points[:: max(1, len(points) // count)][:count]
    labels = torch.zeros(len(points), dtype=torch.long)
    for _ in range(_ROUNDS):
        costs = torch.cdist(points, centres).square().repeat_interleave(size, dim=1)
        places = torch.from_numpy(linear_sum_assignment(costs.double().numpy())[1])
        if torch.equal(places // size, labels):
            break
        labels = places // size
        centres = torch.stack([points[labels == cluster].mean(0) for cluster in range(count)])
    return labels.argsort(stable=True)
