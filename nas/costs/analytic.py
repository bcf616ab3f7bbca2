"""FLOPs and parameters of an architecture in closed form: the source of truth, checked by counting.

FLOPs = 2 x multiply-accumulates, per token, forward. Attention is counted as its two full products of S x S (the
unfused form; a causal kernel may do half). Element-wise work, biases, norms and the embedding look-up count as zero, as
in ``torch.utils.flop_counter`` and fvcore.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.nas.context import Context, Extent
from moesaic.nas.costs.use import LayerUse
from moesaic.search_spaces import Architecture, Attention, Backbone, CrossAttention, FeedForward, Slot


def layer_flops(architecture: Architecture, slot: Slot, use: LayerUse, context: Context) -> dict[str, float]:
    """FLOPs per token of ``context`` of one layer by part."""
    layer, width, backbone = architecture.layers[slot], architecture.width_at(slot), architecture.backbone
    extent, part, memory = context.extent(slot.stack), layer.feed_forward, architecture.memory_width
    per_neuron = 2 * backbone.matrices * width
    q, kv = backbone.widths(layer.attention)
    per_token = {
        "projections": 4 * width * (q + kv),
        "attention": 4 * extent.mean_keys * q,
        "router": _router_flops(width, part),
        "experts": per_neuron * use.neurons,
        "shared": per_neuron * part.shared_size,
    }
    share = extent.all_tokens / context.tokens
    flops = {name: share * value for name, value in per_token.items()}
    if architecture.encoder is not None:
        flops["cross"] = _cross_flops(width, memory, layer.cross, backbone, extent) / context.tokens
    return flops


def _cross_flops(
    width: int, memory_width: int, cross: CrossAttention | None, backbone: Backbone, extent: Extent
) -> float:
    """Of all tokens: queries and outputs, keys and values of each source once, and the two products."""
    if cross is None:
        return 0
    q, kv = backbone.widths(cross)
    read = cross.span * extent.read
    return 4 * (extent.all_tokens * q * (width + read) + extent.sources * read * memory_width * kv)


def head_products(architecture: Architecture, context: Context) -> float:
    """Multiply-accumulates per token of ``context`` of what turns final states into logits."""
    head, width = architecture.backbone.head, architecture.output.width
    share = context.output.all_tokens / context.tokens
    return (
        share * {"linear": width * context.vocab_size, "masked": width * (width + context.vocab_size), "none": 0}[head]
    )


def flops_breakdown(
    architecture: Architecture, uses: Sequence[LayerUse], context: Context
) -> tuple[dict[Slot, dict[str, float]], float]:
    """Each layer by part, and the head; FLOPs per token."""
    slots = zip(architecture.layers, uses, strict=True)
    layers = {slot: layer_flops(architecture, slot, use, context) for slot, use in slots}
    return layers, 2 * head_products(architecture, context)


def flops(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> float:
    """FLOPs per token: the sum of ``flops_breakdown``, written out because a search asks for it most."""
    backbone, memory = architecture.backbone, architecture.memory_width
    total = 2 * head_products(architecture, context)
    extents = {name: context.extent(name) for name in architecture.stacks}
    for (slot, layer), use in zip(architecture.layers.items(), uses, strict=True):
        width, extent, part = architecture.width_at(slot), extents[slot.stack], layer.feed_forward
        q, kv = backbone.widths(layer.attention)
        own = 4 * (width * (q + kv) + extent.mean_keys * q)
        own += 2 * backbone.matrices * width * (use.neurons + part.shared_size)
        if part.router:
            own += _router_flops(width, part)
        total += own * extent.all_tokens / context.tokens
        if layer.cross is not None:
            total += _cross_flops(width, memory, layer.cross, backbone, extent) / context.tokens
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
    total += _embeddings(architecture, context)
    for stack in architecture.stacks.values():
        total += stack.width * ((backbone.max_positions or 0) + norms * backbone.norm_vectors)
    for (slot, layer), count in zip(architecture.layers.items(), neurons, strict=True):
        width, attention, part = architecture.width_at(slot), layer.attention, layer.feed_forward
        q, kv = backbone.widths(attention)
        total += width * (layer.blocks * backbone.norm_vectors + 2 * (q + kv))
        if layer.cross is not None:
            across, read = backbone.widths(layer.cross)
            total += 2 * (width * across + architecture.memory_width * read) + reads * (across + 2 * read)
            total += _qk_norms(backbone, layer.cross)
        total += backbone.matrices * width * count
        if part.router:
            total += (width + part.router.predicts_mass) * part.experts
            total += part.router.hidden(width) * (width + 1 + part.experts)
            total += width * (backbone.shared_gate and part.shared_size > 0)
        total += _qk_norms(backbone, attention)
        total += reads * (q + 2 * kv)
        total += all_biases * (layer.blocks * width + count)
    return total


def _qk_norms(backbone: Backbone, attention: Attention | CrossAttention) -> int:
    heads = attention.heads + attention.kv_heads
    return {"none": 0, "head": 2 * (heads > 0), "all": heads}[backbone.qk_norm] * backbone.head_size


def _embeddings(architecture: Architecture, context: Context) -> int:
    """Stacks of one vocabulary share a table as wide as the widest of them."""
    if context.source_vocab_size is None:
        return max(stack.width for stack in architecture.stacks.values()) * context.vocab_size
    return architecture.memory_width * context.source_vocab_size + architecture.output.width * context.vocab_size
