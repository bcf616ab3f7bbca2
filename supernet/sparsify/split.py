"""One pass of calibration text through a trained model, layer by layer: reorders each layer so that its slices are the
best ones, fits the routers, and measures what every choice of the layer costs in quality.

Only the states of one layer are held beside the weights. Shapes: B sequences, S positions, T = B S tokens, D width,
N neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.search_spaces import FeedForward, SearchSpace, Slot
from moesaic.search_spaces.space import LayerSpace
from moesaic.supernet.batch import Inputs
from moesaic.supernet.evaluate import LayerLoad
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.model import Transformer, TransformerLayer, TransformerStack
from moesaic.supernet.sharing import splits_dense
from moesaic.supernet.sparsify.experts import expert_order
from moesaic.supernet.sparsify.neurons import STORED, contributions, hidden, neuron_order
from moesaic.supernet.sparsify.routers import FITS, Neurons, bounded, fit_hidden, masses

_ROWS = 4
"""Sequences that pass through a layer at once."""
_JUDGED = 2048
"""Most tokens on which the choices of a layer are compared."""


@dataclass(frozen=True)
class PartCost:
    """What a layer loses when ``part`` replaces its feed-forward part, the rest of the model unchanged.

    ``error`` is the squared error of the part's output, as a share of the output's square; ``load`` is the experts'.
    """

    slot: Slot
    part: FeedForward
    error: float
    load: LayerLoad | None


@dataclass(frozen=True)
class LayerInput:
    """What a layer's feed-forward part reads, [T, D]."""

    slot: Slot
    feed_forward: SparseFeedForward
    part: FeedForward
    read: Tensor


@torch.no_grad()
def split(
    source: Transformer,
    space: SearchSpace,
    windows: Tensor,
    cluster: str = "coactivation",
    router: str = "regression",
    on_layer: Callable[[int], None] = lambda done: None,
) -> tuple[Transformer, list[PartCost]]:
    """A model of ``space.envelope`` whose largest slice is ``source``, and the cost of every part of every layer.

    ``source`` hands its weights over and is not to be used again. ``windows`` [B, S] are token ids. ``cluster`` is a
    key of ``neurons.CLUSTERS`` and ``router`` one of ``routers.FITS``. ``on_layer`` gets how many layers are done.
    """
    with torch.device("meta"):
        model = Transformer(space.envelope, source.vocab_size)
    given = dict(source.named_parameters())
    costs: list[PartCost] = []
    for done, given_to in enumerate(layer_inputs(source, windows.to(source.device)), start=1):
        slot, old = given_to.slot, given_to.feed_forward
        name = f"stacks.{slot.stack}.layers.{slot.index}.feed_forward"
        new = SparseFeedForward(old.width, space.envelope.layers[slot].feed_forward, space.backbone, model.sharing)
        new = new.to(source.device)
        _fill(new, given_to, space.layers[slot], cluster, router)
        given = {key: value for key, value in given.items() if not key.startswith(f"{name}.")}
        given |= {f"{name}.{key}": value for key, value in new.named_parameters()}
        costs += _part_costs(new, given_to, space.layers[slot])
        on_layer(done)
    missing = model.load_state_dict(given, strict=True, assign=True)
    assert not missing.missing_keys
    return model.eval(), costs


def layer_inputs(source: Transformer, windows: Tensor) -> Iterator[LayerInput]:
    """Every layer of ``source`` in order, with its inputs for the token ids ``windows`` [B, S]."""
    for name, stack in source.architecture.stacks.items():
        module, inputs = source.stacks[name], Inputs(stack.causal)
        assert isinstance(module, TransformerStack)
        states = [module.embedded(part, stack) for part in windows.split(_ROWS)]
        for index, (block, layer) in enumerate(zip(module.layers, stack.layers, strict=True)):
            assert isinstance(block, TransformerLayer)
            states = [block.attend(x, layer, inputs) for x in states]
            read = [block.reads(x).flatten(0, 1) for x in states]
            yield LayerInput(Slot(name, index), block.feed_forward, layer.feed_forward, torch.cat(read))
            outputs = (block.feed_forward(x, layer.feed_forward)[0] for x in read)
            states = [block.written(x, out.view_as(x)) for x, out in zip(states, outputs, strict=True)]


_PER_NEURON = ("up", "gate", "down", "up_bias")
"""Parameters with a row, or a value, per neuron."""


def _fill(new: SparseFeedForward, given: LayerInput, space: LayerSpace, cluster: str, router: str) -> None:
    """Copy a layer into ``new``, in the order of importance, and fit the routers of one that was dense."""
    old, read = given.feed_forward, given.read
    values: dict[str, Tensor] = dict(old.named_parameters())
    rows = torch.arange(given.part.neurons, device=read.device)
    if given.part.router is None and splits_dense(new.part):
        contribution = contributions(hidden(old, read), old.down)
        rows = neuron_order(old, contribution, _bounds(space), cluster)
        values |= _routers(new, old, read, rows, contribution[:, rows], router)
    elif given.part.router is not None and not given.part.router.predicts_mass and cluster != STORED:
        rows, experts = expert_order(old, given.part, read)
        values["router"] = values["router"][experts]
    for name, value in values.items():
        setattr(new, name, nn.Parameter(value[rows] if name in _PER_NEURON else value.detach(), requires_grad=False))


def _routers(
    new: SparseFeedForward, old: SparseFeedForward, read: Tensor, rows: Tensor, contribution: Tensor, router: str
) -> dict[str, Tensor]:
    """Router parameters for ``new``, whose neurons are the ``rows`` of ``old`` and make ``contribution`` [T, N]."""
    weight = (old.up if old.gate is None else old.gate)[rows]
    bias = contribution.new_zeros(len(rows)) if old.up_bias is None else old.up_bias[rows]
    tile = new.part.expert_sizes[0]
    linear, offset = FITS[router](read, Neurons(contribution, weight, bias), tile)
    found = {"router": linear, "router_bias": offset}
    if new.router_in is not None:
        missing = bounded(masses(contribution, tile)) - F.linear(read, linear, offset)
        hidden = fit_hidden(read, missing, len(new.router_in))
        found |= zip(("router_in", "router_in_bias", "router_out"), hidden, strict=True)
    return found


def _bounds(space: LayerSpace) -> list[int]:
    """Numbers of rows that some choice takes as its first: shared neurons, and those of a smaller dense layer."""
    return [size for group in space.groups for size in (group.shared_sizes if group.experts > 1 else group.sizes)]


def _part_costs(new: SparseFeedForward, given: LayerInput, space: LayerSpace) -> list[PartCost]:
    read = given.read[:: max(1, len(given.read) // _JUDGED)]
    bias = 0 if given.feed_forward.down_bias is None else given.feed_forward.down_bias  # common to all choices
    target = given.feed_forward(read, given.part)[0] - bias
    size, costs = target.square().sum().clamp(min=1e-30), []
    for choice in _choices(space):
        out, routing = new(read, choice)
        load = None if routing is None else LayerLoad(tuple((routing.load / len(read)).tolist()))
        error = (out - bias - target).square().sum() / size
        costs.append(PartCost(given.slot, choice, error.item(), load))
    return costs


def _choices(space: LayerSpace) -> Iterator[FeedForward]:
    """The parts of a layer whose experts are of one size; of a mixture there are too many others."""
    for group in space.groups:
        for size, shared, router in product(group.sizes, group.shared_sizes, group.routers):
            yield FeedForward((size,) * group.experts, router, shared)
