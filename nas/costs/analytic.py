"""FLOPs, parameters and memory of an architecture in closed form: the source of truth, checked by counting.

FLOPs = 2 x multiply-accumulates, per token, forward. Attention is counted as its two full products of S x S (the
unfused form; a causal kernel may do half). Element-wise work, biases, norms and the embedding look-up count as zero, as
in ``torch.utils.flop_counter`` and fvcore.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.kernels.segments import BLOCK_ELEMENTS
from moesaic.nas.context import Context
from moesaic.nas.costs.use import LayerUse
from moesaic.search_spaces import Architecture, Slot


def layer_flops(architecture: Architecture, slot: Slot, use: LayerUse, context: Context) -> dict[str, float]:
    """FLOPs per token of one layer by part."""
    layer, width, head_size = architecture.layers[slot], architecture.width_at(slot), architecture.backbone.head_size
    heads, kv_heads, part = layer.attention.heads, layer.attention.kv_heads, layer.feed_forward
    per_neuron = 2 * architecture.backbone.matrices * width
    return {
        "projections": 4 * width * (heads + kv_heads) * head_size,
        "attention": 4 * context.extent(slot.stack).keys * heads * head_size,
        "router": 2 * width * part.experts if part.router else 0,
        "experts": per_neuron * use.neurons,
        "shared": per_neuron * part.shared_size,
    }


def flops_breakdown(
    architecture: Architecture, uses: Sequence[LayerUse], context: Context
) -> tuple[dict[Slot, dict[str, float]], float]:
    """Each layer by part, and the vocabulary layer; FLOPs per token."""
    slots = zip(architecture.layers, uses, strict=True)
    layers = {slot: layer_flops(architecture, slot, use, context) for slot, use in slots}
    return layers, 2 * architecture.output.width * context.vocab_size


def flops(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> float:
    """FLOPs per token: the sum of ``flops_breakdown``, written out because a search asks for it most."""
    backbone = architecture.backbone
    total = 2 * architecture.output.width * context.vocab_size
    for (slot, layer), use in zip(architecture.layers.items(), uses, strict=True):
        width, keys = architecture.width_at(slot), context.extent(slot.stack).keys
        attention, part = layer.attention, layer.feed_forward
        total += 4 * backbone.head_size * (width * (attention.heads + attention.kv_heads) + keys * attention.heads)
        total += 2 * backbone.matrices * width * (use.neurons + part.shared_size)
        if part.router:
            total += 2 * width * part.experts
    return total


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
    for stack in architecture.stacks.values():
        total += stack.width * (context.vocab_size + (backbone.max_positions or 0) + norms * backbone.norm_vectors)
    for (slot, layer), count in zip(architecture.layers.items(), neurons, strict=True):
        width, attention, part = architecture.width_at(slot), layer.attention, layer.feed_forward
        heads = attention.heads + attention.kv_heads
        total += 2 * width * (backbone.norm_vectors + heads * backbone.head_size)
        total += backbone.matrices * width * count + (width * part.experts if part.router else 0)
        total += reads * (heads + attention.kv_heads) * backbone.head_size + all_biases * (2 * width + count)
    return total


def weight_memory(architecture: Architecture, context: Context) -> int:
    """Bytes of the weights, kept in float32."""
    return 4 * parameters(architecture, context)


def activation_memory(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> float:
    """Bytes of the activations alive at once at the worst moment of an inference pass in ``context``, with the cache.

    The moments looked at: attention's mix (residual, its norm, q, k, v, both of them repeated per query head, the mix)
    and last product (the mix in two orders and the result in place of what was repeated), the largest expert's product
    (residual, norm, result, a block of gathered pairs, its pre-activations and hidden values), the shared expert's, and
    the logits.
    """
    backbone, size = architecture.backbone, context.bytes_per_value
    kept: float = 8 * context.tokens + cache_memory(architecture, context)  # token ids
    peak = vocabulary_memory(architecture.output.width, context)
    hidden_copies = 3 if backbone.gated else 2
    for (slot, layer), use in zip(architecture.layers.items(), uses, strict=True):
        part, width, tokens = layer.feed_forward, architecture.width_at(slot), context.extent(slot.stack).tokens
        heads, kv_heads = (n * backbone.head_size for n in (layer.attention.heads, layer.attention.kv_heads))
        repeated = 2 * heads if context.phase == "prefill" else 0
        mix, product = 2 * width + 2 * heads + repeated, 3 * width + 3 * heads
        peak = max(peak, tokens * (max(mix, product) + 2 * kv_heads) * size)
        pairs = tokens * use.pairs
        if part.router is None:
            values = tokens * (3 * width + hidden_copies * part.neurons)
            peak = max(peak, values * size)
            continue
        kept += 12 * pairs + 4 * tokens * part.experts  # its routing: token index, weight, softmax
        routing = 8 * pairs  # expert index
        block = min(pairs * width, BLOCK_ELEMENTS)
        routed = 3 * tokens * width + block + hidden_copies * tokens * use.largest_neurons
        shared = tokens * (4 * width + hidden_copies * part.shared_size) if part.shared_size else 0
        peak = max(peak, routing + max(routed, shared) * size)
    return peak + kept


def vocabulary_memory(width: int, context: Context) -> float:
    """Bytes of the last states of ``width``, normed too, and of the logits: any network's activations need these."""
    return context.tokens * (2 * width + context.vocab_size) * context.bytes_per_value


def cache_memory(architecture: Architecture, context: Context) -> int:
    """Bytes of the key/value cache of a decoding step, the new position included; 0 in a prefill."""
    if context.phase == "prefill":
        return 0
    values = sum(
        layer.attention.kv_heads * extent.sequences * (extent.keys + 1)
        for slot, layer in architecture.layers.items()
        for extent in (context.extent(slot.stack),)
    )
    return 2 * architecture.backbone.head_size * values * context.bytes_per_value
