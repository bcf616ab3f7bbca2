"""FLOPs, parameters and memory of an architecture in closed form: the source of truth, checked by counting.

FLOPs = 2 x multiply-accumulates, per token, forward. Attention is counted as its two full products of S x S (the
unfused form; a causal kernel may do half). Element-wise work, norms and the embedding look-up count as zero, as in
``torch.utils.flop_counter`` and fvcore.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.kernels.segments import BLOCK_ELEMENTS
from moesaic.nas.context import Context
from moesaic.nas.costs.use import LayerUse
from moesaic.search_spaces import Architecture, Layer


def layer_flops(architecture: Architecture, layer: Layer, use: LayerUse, context: Context) -> dict[str, float]:
    """FLOPs per token of one layer by part."""
    width, head_size = architecture.decoder.width, architecture.backbone.head_size
    heads, kv_heads, part = layer.attention.heads, layer.attention.kv_heads, layer.feed_forward
    per_neuron = 2 * architecture.backbone.matrices * width
    return {
        "projections": 4 * width * (heads + kv_heads) * head_size,
        "attention": 4 * context.sequence_length * heads * head_size,
        "router": 2 * width * part.experts if part.router else 0,
        "experts": per_neuron * use.neurons,
        "shared": per_neuron * part.shared_size,
    }


def flops_breakdown(
    architecture: Architecture, uses: Sequence[LayerUse], context: Context
) -> tuple[list[dict[str, float]], float]:
    """Per layer by part, and the vocabulary layer; FLOPs per token."""
    stack = architecture.decoder
    layers = [layer_flops(architecture, layer, use, context) for layer, use in zip(stack.layers, uses, strict=True)]
    return layers, 2 * stack.width * context.vocab_size


def flops(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> float:
    """FLOPs per token: the sum of ``flops_breakdown``, written out because a search asks for it most."""
    stack, backbone = architecture.decoder, architecture.backbone
    total = 2 * stack.width * context.vocab_size
    per_neuron = 2 * backbone.matrices * stack.width
    for layer, use in zip(stack.layers, uses, strict=True):
        attention, part = layer.attention, layer.feed_forward
        total += (
            4
            * backbone.head_size
            * (stack.width * (attention.heads + attention.kv_heads) + context.sequence_length * attention.heads)
        )
        total += per_neuron * (use.neurons + part.shared_size)
        if part.router:
            total += 2 * stack.width * part.experts
    return total


def parameters(architecture: Architecture, context: Context) -> int:
    """All weights; the tied embedding counts once."""
    neurons = [layer.feed_forward.neurons for layer in architecture.decoder.layers]
    return round(_parameters(architecture, neurons, context))


def active_parameters(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> float:
    """Weights that one token meets: all but the neurons of experts it is not routed to."""
    layers = architecture.decoder.layers
    neurons = [use.neurons + layer.feed_forward.shared_size for layer, use in zip(layers, uses, strict=True)]
    return _parameters(architecture, neurons, context)


def _parameters(architecture: Architecture, neurons: Sequence[float], context: Context) -> float:
    stack, backbone = architecture.decoder, architecture.backbone
    width = stack.width
    total: float = width * (context.vocab_size + 1)
    for layer, count in zip(stack.layers, neurons, strict=True):
        attention, part = layer.attention, layer.feed_forward
        total += 2 * width + 2 * width * (attention.heads + attention.kv_heads) * backbone.head_size
        total += backbone.matrices * width * count + (width * part.experts if part.router else 0)
    return total


def weight_memory(architecture: Architecture, context: Context) -> int:
    """Bytes of the weights, kept in float32."""
    return 4 * parameters(architecture, context)


def activation_memory(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> float:
    """Bytes of the activations alive at once at the worst moment of an inference pass in ``context``, with the cache.

    The moments looked at: attention's last product (residual, its norm, q, k, v per query head, their mix in two
    orders, the result), the largest expert's product (residual, norm, result, a block of gathered pairs, its
    pre-activations and hidden values), the shared expert's, and the logits.
    """
    stack, backbone = architecture.decoder, architecture.backbone
    tokens, width, size = context.tokens, stack.width, context.bytes_per_value
    kept: float = 8 * tokens + cache_memory(architecture, context)  # token ids; each layer's routing once it is known
    peak: float = tokens * (2 * width + context.vocab_size) * size
    for layer, use in zip(stack.layers, uses, strict=True):
        part = layer.feed_forward
        heads = layer.attention.heads * backbone.head_size
        peak = max(peak, tokens * (3 * width + 5 * heads) * size)
        pairs = tokens * use.pairs
        hidden_copies = 3 if backbone.activation == "swiglu" else 2
        if part.router is None:
            values = tokens * (3 * width + hidden_copies * part.neurons)
            peak = max(peak, values * size)
            continue
        kept += 12 * pairs + 4 * tokens * part.experts  # token index, weight, softmax
        routing = 8 * pairs  # expert index
        block = min(pairs * width, BLOCK_ELEMENTS)
        routed = 3 * tokens * width + block + hidden_copies * tokens * use.largest_neurons
        shared = tokens * (4 * width + hidden_copies * part.shared_size) if part.shared_size else 0
        peak = max(peak, routing + max(routed, shared) * size)
    return peak + kept


def cache_memory(architecture: Architecture, context: Context) -> int:
    """Bytes of the key/value cache of a decoding step, the new position included; 0 in a prefill."""
    if context.phase == "prefill":
        return 0
    heads = sum(layer.attention.kv_heads for layer in architecture.decoder.layers)
    positions = context.batch_size * (context.sequence_length + 1)
    return 2 * heads * architecture.backbone.head_size * positions * context.bytes_per_value
