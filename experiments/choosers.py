"""Routers that only an analysis can have: one that knows every expert's activation mass, one that draws experts, and
linear ones fitted in other ways to the layers of a split model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moesaic import Transformer
from moesaic.kernels import Routing, route
from moesaic.search_spaces import FeedForward
from moesaic.search_spaces.parts import TILE
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.sparsify.neurons import contributions, hidden
from moesaic.supernet.sparsify.routers import FITS, Neurons, masses
from moesaic.supernet.sparsify.split import layer_inputs


def true_masses(layer: SparseFeedForward, x: Tensor, part: FeedForward) -> Tensor:
    """[T, E] activation mass of each routed expert of ``part``, all of one size."""
    return masses(contributions(hidden(layer, x), layer.down)[:, part.shared_size :], part.expert_sizes[0])


def _by_oracle(layer: SparseFeedForward, x: Tensor, part: FeedForward) -> Routing:
    return _chosen(true_masses(layer, x, part), part)


def _by_chance(layer: SparseFeedForward, x: Tensor, part: FeedForward) -> Routing:
    return _chosen(torch.rand(len(x), part.experts, generator=torch.Generator().manual_seed(len(x))), part)


def _chosen(mass: Tensor, part: FeedForward) -> Routing:
    assert part.router is not None
    return route(mass, max_experts=part.router.max_experts, score="mass", weights="one")


CHOOSERS: dict[str, Callable[[SparseFeedForward, Tensor, FeedForward], Routing]] = {
    "oracle": _by_oracle,
    "random": _by_chance,
}


def choose_by(model: Transformer, name: str | None) -> None:
    """Let every layer choose its experts by ``CHOOSERS[name]``; None: by its own router."""
    for layer in model.layers:
        module = layer.feed_forward
        module.__dict__.pop("route", None)
        if name is not None:
            module.__dict__["route"] = partial(CHOOSERS[name], module)


@torch.no_grad()
def refit(model: Transformer, windows: Tensor, name: str) -> None:
    """Replace the linear routers of a split ``model`` by those of ``routers.FITS[name]`` on ``windows`` [B, S]."""
    for given in layer_inputs(model, windows):
        layer, read = given.block.feed_forward, given.read()
        assert layer.router is not None and layer.router_bias is not None
        weight = layer.up if layer.gate is None else layer.gate
        bias = weight.new_zeros(len(weight)) if layer.up_bias is None else layer.up_bias
        neurons = Neurons(contributions(hidden(layer, read), layer.down), weight, bias)
        rows, offset = FITS[name](read, neurons, TILE)
        layer.router.copy_(rows)
        layer.router_bias.copy_(offset)
