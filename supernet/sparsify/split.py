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

from moesaic.search_spaces import Attention, FeedForward, Layer, SearchSpace, Slot
from moesaic.search_spaces.space import LayerSpace
from moesaic.supernet.batch import Inputs
from moesaic.supernet.evaluate import LayerLoad
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.model import Transformer
from moesaic.supernet.sharing import splits_dense
from moesaic.supernet.sparsify.activity import LayerActivity, activity, captured
from moesaic.supernet.sparsify.experts import expert_order
from moesaic.supernet.sparsify.heads import head_order, reorder_heads
from moesaic.supernet.sparsify.neurons import STORED, contributions, hidden, neuron_order
from moesaic.supernet.sparsify.routers import FITS, Neurons, bounded, fit_hidden, masses
from moesaic.supernet.stack import TransformerLayer, TransformerStack

_ROWS = 4
"""Sequences that pass through a layer at once."""
_JUDGED = 2048
"""Most tokens on which the choices of a layer are compared."""


@dataclass(frozen=True)
class PartCost:
    """What a layer loses when ``part`` replaces its attention or feed-forward part, the rest of the model unchanged.

    ``error`` is the squared error of the part's output, as a share of the output's square; ``load`` is the experts'.
    """

    slot: Slot
    part: Attention | FeedForward
    error: float
    load: LayerLoad | None


@dataclass(frozen=True)
class LayerInput:
    """States [b, S, D] of a few sequences each, before the layer and after its attention."""

    slot: Slot
    block: TransformerLayer
    layer: Layer
    inputs: Inputs
    before: list[Tensor]
    after: list[Tensor]

    def read(self) -> Tensor:
        """[T, D] what the feed-forward part reads."""
        return torch.cat([self.block.reads(x).flatten(0, 1) for x in self.after])


@dataclass(frozen=True)
class Split:
    """A model of the space's envelope whose largest slice is the trained one; what every part costs; and how sparse
    the layers with a feed-forward part are."""

    model: Transformer
    costs: list[PartCost]
    activities: list[LayerActivity]


@torch.no_grad()
def split(
    source: Transformer,
    space: SearchSpace,
    windows: Tensor,
    cluster: str = "coactivation",
    router: str = "regression",
    on_layer: Callable[[int], None] = lambda done: None,
) -> Split:
    """Reorders ``source`` into the members of ``space``.

    ``source`` hands its weights over and is not to be used again. ``windows`` [B, S] are token ids. ``cluster`` is a
    key of ``neurons.CLUSTERS`` and ``router`` one of ``routers.FITS``. ``on_layer`` gets how many layers are done.
    """
    with torch.device("meta"):
        model = Transformer(space.envelope, source.vocab_size)
    given = dict(source.named_parameters())
    costs, activities = list[PartCost](), list[LayerActivity]()
    for done, one in enumerate(layer_inputs(source, windows.to(source.device)), start=1):
        choices, name = space.layers[one.slot], f"stacks.{one.slot.stack}.layers.{one.slot.index}"
        if len(choices.attentions) > 1:
            if cluster != STORED:
                _order_heads(one)
            given |= {f"{name}.attention.{key}": value for key, value in one.block.attention.named_parameters()}
            costs += _attention_costs(one, choices)
        if one.layer.feed_forward.experts:
            old, read, bank = one.block.feed_forward, one.read(), space.envelope.layers[one.slot].feed_forward
            new = SparseFeedForward(old.width, bank, space.backbone, model.sharing).to(source.device)
            _fill(new, old, one.layer.feed_forward, read, choices, cluster, router)
            given = {key: value for key, value in given.items() if not key.startswith(f"{name}.feed_forward.")}
            given |= {f"{name}.feed_forward.{key}": value for key, value in new.named_parameters()}
            costs += _part_costs(one.slot, new, old, one.layer.feed_forward, read, choices)
            found = captured(new, _few(read)) if one.layer.feed_forward.router is None and splits_dense(bank) else ()
            activities.append(LayerActivity(one.slot, activity(old, one.layer.feed_forward, read), found))
        on_layer(done)
    missing = model.load_state_dict(given, strict=True, assign=True)
    assert not missing.missing_keys
    return Split(model.eval(), costs, activities)


def layer_inputs(source: Transformer, windows: Tensor) -> Iterator[LayerInput]:
    """Every layer of ``source`` in order, with its inputs for the token ids ``windows`` [B, S]."""
    for name, stack in source.architecture.stacks.items():
        module, inputs = source.stacks[name], Inputs(stack.causal)
        assert isinstance(module, TransformerStack)
        states = [module.embedded(part, stack) for part in windows.split(_ROWS)]
        for index, (block, layer) in enumerate(zip(module.layers, stack.layers, strict=True)):
            assert isinstance(block, TransformerLayer)
            after = [block.attend(x, layer, inputs) for x in states]
            yield LayerInput(Slot(name, index), block, layer, inputs, states, after)
            states = [block.feed(x, layer, inputs)[0] for x in after]


_PER_NEURON = ("up", "gate", "down", "up_bias")
"""Parameters with a row, or a value, per neuron."""


def _order_heads(one: LayerInput) -> None:
    block = one.block
    mixed = torch.cat([block.attention.mixed(block.attended(x), one.inputs).flatten(0, 1) for x in one.before])
    reorder_heads(block.attention, head_order(block.attention, mixed))


def _attention_costs(one: LayerInput, space: LayerSpace) -> list[PartCost]:
    sequences = torch.cat([one.block.attended(x) for x in one.before])
    sequences = sequences[: max(1, _JUDGED // sequences.shape[1])]
    module, whole = one.block.attention, one.layer.attention
    bias = 0 if module.o_bias is None else module.o_bias  # common to all choices
    target = module(sequences, whole, one.inputs) - bias
    costs = []
    for choice in space.attentions:
        out = module(sequences, choice, one.inputs) - bias if choice.heads else torch.zeros_like(target)
        costs.append(PartCost(one.slot, choice, _error(out, target), None))
    return costs


def _error(out: Tensor, target: Tensor) -> float:
    return ((out - target).square().sum() / target.square().sum().clamp(min=1e-30)).item()


def _fill(
    new: SparseFeedForward,
    old: SparseFeedForward,
    part: FeedForward,
    read: Tensor,
    space: LayerSpace,
    cluster: str,
    router: str,
) -> None:
    """Copy a layer into ``new``, in the order of importance, and fit the routers of one that was dense."""
    values: dict[str, Tensor] = dict(old.named_parameters())
    rows = torch.arange(part.neurons, device=read.device)
    if part.router is None and splits_dense(new.part):
        contribution = contributions(hidden(old, read), old.down)
        rows = neuron_order(old, contribution, _bounds(space), cluster)
        values |= _routers(new, old, read, rows, contribution[:, rows], router)
    elif part.router is not None and not part.router.predicts_mass and cluster != STORED:
        rows, experts = expert_order(old, part, read)
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
    groups = (group for group in space.groups if group.experts)
    return [size for group in groups for size in (group.shared_sizes if group.experts > 1 else group.sizes)]


def _part_costs(
    slot: Slot, new: SparseFeedForward, old: SparseFeedForward, part: FeedForward, read: Tensor, space: LayerSpace
) -> list[PartCost]:
    read = _few(read)
    bias = 0 if old.down_bias is None else old.down_bias  # common to all choices
    target, costs = old(read, part)[0] - bias, []
    for choice in _choices(space):
        out, routing = new(read, choice) if choice.experts else (torch.zeros_like(target) + bias, None)
        load = None if routing is None else LayerLoad(tuple((routing.load / len(read)).tolist()))
        costs.append(PartCost(slot, choice, _error(out - bias, target), load))
    return costs


def _few(read: Tensor) -> Tensor:
    """Tokens on which choices are compared, evenly spread."""
    return read[:: max(1, len(read) // _JUDGED)]


def _choices(space: LayerSpace) -> Iterator[FeedForward]:
    """The parts of a layer whose experts are of one size; of a mixture there are too many others."""
    for group in space.groups:
        for size, shared, router in product(group.sizes, group.shared_sizes, group.routers):
            yield FeedForward((size,) * group.experts, router, shared)
