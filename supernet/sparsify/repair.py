"""Block-local recovery in closed form: each layer's output weights are fitted again to the trained model's outputs.

Layer by layer, the slice reads its own states, errors of earlier layers included. The output weights of attention that
changed, and of the feed-forward part in a layer that changed, become the least-squares solution for the states of the
trained model. Shapes: T tokens, n values that the output weights read, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.search_spaces import Architecture, FeedForward
from moesaic.supernet.batch import Inputs
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.model import Transformer
from moesaic.supernet.sharing import expert_layout
from moesaic.supernet.sparsify.neurons import hidden
from moesaic.supernet.stack import TransformerLayer, TransformerStack
from moesaic.supernet.weights import Weights

_ROWS = 4
_RIDGE = 0.3
"""Strength of the pull towards the trained weights, in mean squares of the hidden values."""


def repaired(
    model: Transformer, trained: Architecture, windows: Tensor, on_layer: Callable[[int], None] = lambda done: None
) -> Weights:
    """Copies of the weights of ``model``'s slice, repaired on ``windows`` [B, S] of token ids.

    ``trained`` is the slice that is the trained model. ``on_layer`` gets the number of layers that are done.
    """

    @torch.no_grad()
    def build(architecture: Architecture) -> Transformer:
        copy = model.extract(architecture)
        _repair(copy, model, trained, windows.to(model.device), on_layer)
        return copy

    return build


def _repair(
    copy: Transformer, model: Transformer, trained: Architecture, windows: Tensor, on_layer: Callable[[int], None]
) -> None:
    for name, stack in copy.architecture.stacks.items():
        mine, theirs, inputs = copy.stacks[name], model.stacks[name], Inputs(stack.causal)
        assert isinstance(mine, TransformerStack) and isinstance(theirs, TransformerStack)
        states = [mine.embedded(part, stack) for part in windows.split(_ROWS)]
        targets = list(states)
        layers = zip(mine.layers, stack.layers, theirs.layers, trained.stacks[name].layers, strict=False)
        for done, (block, layer, source, whole) in enumerate(layers, start=1):
            assert isinstance(block, TransformerLayer) and isinstance(source, TransformerLayer)
            after = [source.attend(x, whole, inputs) for x in targets]
            if layer.attention.heads and layer.attention != whole.attention:
                read = torch.cat([block.attention.mixed(block.attended(x), inputs).flatten(0, 1) for x in states])
                outputs = [source.attention(source.attended(x), whole.attention, inputs) for x in targets]
                fit_rows(block.attention.o.T, block.attention.o_bias, read, _missing(block, outputs, targets, states))
            states = [block.attend(x, layer, inputs) for x in states]
            if layer.feed_forward.experts and layer != whole:  # also makes up for attention that is gone
                read = torch.cat([block.reads(x).flatten(0, 1) for x in states])
                outputs = [
                    source.feed_forward(source.reads(x).flatten(0, 1), whole.feed_forward)[0].view_as(x) for x in after
                ]
                fit_down(block.feed_forward, layer.feed_forward, read, _missing(block, outputs, after, states))
            states = [block.feed(x, layer, inputs)[0] for x in states]
            targets = [source.feed(x, whole, inputs)[0] for x in after]
            on_layer(done)


def _missing(block: TransformerLayer, outputs: list[Tensor], before: list[Tensor], mine: list[Tensor]) -> Tensor:
    """[T, D] what a part of ``block`` is to write: the trained part's ``outputs`` and, where the sum is not normed, the
    difference between the trained model's states ``before`` the part and ``mine``."""
    gaps = zip(outputs, before, mine, strict=True)
    return torch.cat([(out if block.post_norm else out + theirs - x).flatten(0, 1) for out, theirs, x in gaps])


def fit_down(layer: SparseFeedForward, part: FeedForward, read: Tensor, target: Tensor) -> None:
    """Change ``layer.down`` so that outputs for ``read`` [T, D] are as near as possible to ``target`` [T, D]."""
    fit_rows(layer.down, layer.down_bias, hidden(layer, read) * used(layer, part, read), target)


def fit_rows(rows: Tensor, bias: Tensor | None, values: Tensor, target: Tensor) -> None:
    """Change ``rows`` [n, D] so that ``values`` [T, n] times them, plus ``bias``, are as near as possible to ``target``
    [T, D].

    Ridge regression of what is missing: rows + (H'H + l I)^-1 H' (target - bias - H rows), where H are the values (0 in
    experts that a token does not use) and l is ``_RIDGE`` times their mean square.
    """
    missing = target - values @ rows
    if bias is not None:
        missing = missing - bias
    gram = (values.T @ values).double()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp(min=1e-12))
    rows.add_(torch.linalg.solve(gram, (values.T @ missing).double()).float())


def used(layer: SparseFeedForward, part: FeedForward, read: Tensor) -> Tensor:
    """[T, n] the weight with which each neuron of the layer serves each token: 1 if shared, 0 if not used."""
    weights = read.new_zeros(len(read), layer.part.neurons)
    if part.router is None:
        weights[:, : part.neurons] = 1
        return weights
    weights[:, : part.shared_size] = 1
    routing = layer.route(read, part)
    for expert, (start, size) in enumerate(expert_layout(layer.part, part, layer.sharing).segments):
        pairs = slice(int(routing.offsets[expert]), int(routing.offsets[expert + 1]))
        weights[routing.tokens[pairs], start : start + size] = routing.weights[pairs, None].to(weights.dtype)
    return weights
