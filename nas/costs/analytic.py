"""FLOPs and parameters of an architecture in closed form: the source of truth, checked by counting.

FLOPs = 2 x multiply-accumulates, per token, forward. Attention is counted as its two full products of S x S (the
unfused form; a causal kernel may do half). Element-wise work, biases, norms and the embedding look-up count as zero, as
in ``torch.utils.flop_counter`` and fvcore.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.nas.context import Context
from moesaic.nas.costs.use import LayerUse
from moesaic.search_spaces import Architecture, FeedForward, Slot


def layer_flops(architecture: Architecture, slot: Slot, use: LayerUse, context: Context) -> dict[str, float]:
    """FLOPs per token of one layer by part."""
    layer, width, head_size = architecture.layers[slot], architecture.width_at(slot), architecture.backbone.head_size
    heads, kv_heads, part = layer.attention.heads, layer.attention.kv_heads, layer.feed_forward
    per_neuron = 2 * architecture.backbone.matrices * width
    return {
        "projections": 4 * width * (heads + kv_heads) * head_size,
        "attention": 4 * context.extent(slot.stack).keys * heads * head_size,
        "router": _router_flops(width, part),
        "experts": per_neuron * use.neurons,
        "shared": per_neuron * part.shared_size,
    }


def head_products(architecture: Architecture, context: Context) -> int:
    """Multiply-accumulates per token of what turns final states into logits."""
    head, width = architecture.backbone.head, architecture.output.width
    return {"linear": width * context.vocab_size, "masked": width * (width + context.vocab_size), "none": 0}[head]


def flops_breakdown(
    architecture: Architecture, uses: Sequence[LayerUse], context: Context
) -> tuple[dict[Slot, dict[str, float]], float]:
    """Each layer by part, and the head; FLOPs per token."""
    slots = zip(architecture.layers, uses, strict=True)
    layers = {slot: layer_flops(architecture, slot, use, context) for slot, use in slots}
    return layers, 2 * head_products(architecture, context)


def flops(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> float:
    """FLOPs per token: the sum of ``flops_breakdown``, written out because a search asks for it most."""
    backbone = architecture.backbone
    total = 2 * head_products(architecture, context)
    for (slot, layer), use in zip(architecture.layers.items(), uses, strict=True):
        width, keys = architecture.width_at(slot), context.extent(slot.stack).keys
        attention, part = layer.attention, layer.feed_forward
        total += 4 * backbone.head_size * (width * (attention.heads + attention.kv_heads) + keys * attention.heads)
        total += 2 * backbone.matrices * width * (use.neurons + part.shared_size)
        if part.router:
            total += _router_flops(width, part)
    return total


def _router_flops(width: int, part: FeedForward) -> int:
    """A linear layer; of an ``mlp`` router also its hidden layer, and the rows from there to the experts."""
    if part.router is None:
        return 0
    return 2 * (width * part.experts + part.router.hidden(width) * (width + part.experts))


def parameters(architecture: Architecture, context: Context) -> int:
    """All weights; a tied embedding counts once."""
    neurons = [layer.feed_forward.neurons for layer in architecture.layers.values()]
    return round(_parameters(architecture, neurons, context))


def active_parameters(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> float:
    """Weights that one token meets: all but the neurons of experts it is not routed to."""
    layers = architecture.layers.values()
    neurons = [use.neurons + layer.feed_forward.shared_size for layer, use in zip(layers, uses, strict=True)]
    return _parameters(architecture, neurons, context)


def _parameters(architecture: Architecture, neurons: Sequence[float], context: Context) -> float:
    backbone = architecture.backbone
    reads, all_biases = backbone.biases != "none", backbone.biases == "all"
    norms = (backbone.norm_place == "pre") + backbone.embedding_norm
    total: float = 0 if backbone.tied else architecture.output.width * context.vocab_size
    if backbone.head == "masked":
        width = architecture.output.width
        total += width * (width + 1 + backbone.norm_vectors) + context.vocab_size
    for stack in architecture.stacks.values():
        total += stack.width * (context.vocab_size + (backbone.max_positions or 0) + norms * backbone.norm_vectors)
    for (slot, layer), count in zip(architecture.layers.items(), neurons, strict=True):
        width, attention, part = architecture.width_at(slot), layer.attention, layer.feed_forward
        heads = attention.heads + attention.kv_heads
        total += width * (layer.blocks * backbone.norm_vectors + 2 * heads * backbone.head_size)
        total += backbone.matrices * width * count
        if part.router:
            total += (width + part.router.predicts_mass) * part.experts
            total += part.router.hidden(width) * (width + 1 + part.experts)
            total += width * (backbone.shared_gate and part.shared_size > 0)
        total += {"none": 0, "head": 2 * (heads > 0), "all": heads}[backbone.qk_norm] * backbone.head_size
        total += reads * (heads + attention.kv_heads) * backbone.head_size
        total += all_biases * (layer.blocks * width + count)
    return total
