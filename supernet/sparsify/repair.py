"""Block-local recovery in closed form: each layer's output weights are fitted again to the trained model's outputs.

Layer by layer, the slice reads its own states, errors of earlier layers included, and its rows of ``down`` become the
least-squares solution for the outputs of the trained model's layer. Shapes: T tokens, n neurons of the slice, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.search_spaces import Architecture, FeedForward
from moesaic.supernet.batch import Inputs
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.model import Transformer, TransformerLayer, TransformerStack
from moesaic.supernet.sharing import expert_layout
from moesaic.supernet.sparsify.neurons import hidden
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
            states = [block.attend(x, layer, inputs) for x in states]
            after = [source.attend(x, whole, inputs) for x in targets]
            wanted = [source.feed_forward(source.reads(x).flatten(0, 1), whole.feed_forward)[0] for x in after]
            if layer.feed_forward != whole.feed_forward:
                read = torch.cat([block.reads(x).flatten(0, 1) for x in states])
                # What is missing after attention, too, is this layer's to make up for.
                gap = torch.cat([(a - x).flatten(0, 1) for a, x in zip(after, states, strict=True)])
                post = block.post_norm
                target = torch.cat(wanted) + (0 if post else gap)
                fit_down(block.feed_forward, layer.feed_forward, read, target)
            states = [_through(block, layer.feed_forward, x) for x in states]
            targets = [source.written(x, out.view_as(x)) for x, out in zip(after, wanted, strict=True)]
            on_layer(done)


def _through(block: TransformerLayer, part: FeedForward, x: Tensor) -> Tensor:
    return block.written(x, block.feed_forward(block.reads(x).flatten(0, 1), part)[0].view_as(x))


def fit_down(layer: SparseFeedForward, part: FeedForward, read: Tensor, target: Tensor) -> None:
    """Change ``layer.down`` so that outputs for ``read`` [T, D] are as near as possible to ``target`` [T, D].

    Ridge regression of what is missing: down + (H'H + l I)^-1 H' (target - H down), where H [T, n] are the weighted
    hidden values of the experts that each token uses, and l is ``_RIDGE`` times their mean square.
    """
    values = hidden(layer, read) * used(layer, part, read)
    missing = target - values @ layer.down
    if layer.down_bias is not None:
        missing = missing - layer.down_bias
    gram = (values.T @ values).double()
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp(min=1e-12))
    layer.down.add_(torch.linalg.solve(gram, (values.T @ missing).double()).float())


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
