"""Memory of an inference pass in closed form: weights, key/value cache, and the activations alive at once.

The states between blocks and the norms are float32. In bfloat16 (autocast), the input and the weights of each product
are copied to it, unless the Triton kernels read them in place. Every moment at which memory can be highest is written
out, so the worst case bounds what ``measure.peak_activation_bytes`` finds on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.kernels.workspace import gathered_values, gathers_rows, triton_bytes
from moesaic.nas.context import Context, Extent
from moesaic.nas.costs.analytic import parameters
from moesaic.nas.costs.use import LayerUse
from moesaic.search_spaces import Architecture, Attention, Backbone, CrossAttention, FeedForward, Layer
from moesaic.supernet.positions import table_length


def weight_memory(architecture: Architecture, context: Context) -> int:
    """Bytes of the weights, kept in float32."""
    return 4 * parameters(architecture, context)


def cache_memory(architecture: Architecture, context: Context) -> int:
    """Bytes of the key/value cache of a decoding step, the new position included; 0 in a prefill. A translation also
    keeps the keys and values of its sources."""
    if context.phase == "prefill":
        return 0
    backbone, values = architecture.backbone, 0
    for slot, layer in architecture.layers.items():
        if architecture.stacks[slot.stack].causal:
            extent = context.extent(slot.stack)
            values += backbone.widths(layer.attention)[1] * extent.sequences * extent.keys
            if layer.cross is not None:
                values += backbone.widths(layer.cross)[1] * extent.sources * extent.read * layer.cross.span
    return 2 * values * context.bytes_per_value


def _source_memory(architecture: Architecture, context: Context) -> int:
    """Bytes of the encoder's states that the decoder reads, which are float32, and their longest concatenation."""
    most = max(architecture.spans, default=0)
    joined = most if most > 1 else 0
    return 4 * context.output.sources * context.output.read * architecture.memory_width * (most + joined)


def activation_memory(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> float:
    """Bytes of the activations alive at the worst moment of an inference pass in ``context``, with the cache."""
    backbone, size = architecture.backbone, context.bytes_per_value
    extents = {name: context.extent(name) for name in architecture.stacks}
    kept: float = 8 * sum(extent.all_tokens for extent in extents.values())  # token ids
    kept += cache_memory(architecture, context) + _source_memory(architecture, context)
    peak: float = head_memory(architecture, context)
    if context.phase == "translate":
        kept += _hypotheses_memory(context.output)
        peak += max(_order_memory(layer, architecture.backbone, context) for layer in architecture.output.layers)
    buffer: float = 0
    for (slot, layer), use in zip(architecture.layers.items(), uses, strict=True):
        width, extent, part = architecture.width_at(slot), extents[slot.stack], layer.feed_forward
        attention = attention_memory(width, layer.attention, backbone, extent, size)
        if layer.cross is not None:
            attention = max(attention, _cross_memory(width, architecture.memory_width, layer.cross, backbone, context))
        routing = _routing_memory(part, use, extent)
        peak = max(peak, attention, routing + _feed_forward_memory(width, part, use, backbone, extent, size))
        kept += routing
        if _copies_rows(part, extent, size):
            buffer = max(buffer, use.neurons * width * size)
    if backbone.positions == "rotary":
        kept += 4 * backbone.rotary_size * sum({extent.keys for extent in extents.values()})  # cos, sin
    if backbone.positions == "sinusoidal":
        kept += sum(4 * table_length(extents[name].keys) * stack.width for name, stack in architecture.stacks.items())
    return peak + kept + buffer


def head_memory(architecture: Architecture, context: Context) -> int:
    """Bytes of the states before the head, their copy, that of its weights, and the logits."""
    tokens, size, vocabulary = context.output.tokens, context.bytes_per_value, context.vocab_size
    head, width = architecture.backbone.head, architecture.output.width
    states = tokens * 4 * width
    if head == "none":
        return states
    logits = _copied(tokens + vocabulary, width, size) + tokens * vocabulary * size
    if context.phase == "translate":  # log probabilities, those that may be chosen, and the sums of hypotheses
        logits += 3 * tokens * vocabulary * 4
    if head == "linear":
        return states + logits
    # The states before the head's own layer stay while that is computed and normed, which autocast does in float32.
    layer = _copied(tokens + width, width, size) + _copied(width, 1, size) + tokens * width * size
    norm = tokens * width * size + states + (states if size < 4 else 0)
    return states + max(layer, norm, states + logits + _copied(vocabulary, 1, size))


def _hypotheses_memory(extent: Extent) -> int:
    """The tokens of a beam search's hypotheses, before and after some are dropped, where there is padding; and the best
    extensions of each."""
    return extent.sequences * (extent.keys * (3 * 8 + 2) + 40 * 8)


def _order_memory(layer: Layer, backbone: Backbone, context: Context) -> int:
    """The copy of a layer's keys while its cache is put in another order."""
    extent = context.output
    return extent.sequences * extent.keys * backbone.widths(layer.attention)[1] * context.bytes_per_value


def _copied(rows: int, width: int, size: int) -> int:
    """Bytes of [rows, width] float32 values copied to a type of ``size`` bytes; nothing where they have it."""
    return rows * width * size if size < 4 else 0


def attention_memory(width: int, attention: Attention, backbone: Backbone, extent: Extent, size: int) -> int:
    """The highest moment of an attention block: a projection, the rotation of q or k, the mix, or the output."""
    if not attention.heads:
        return 0
    tokens, pre = extent.tokens, backbone.norm_place == "pre"
    q, kv = backbone.widths(attention)
    copies_q, copies_kv = (
        _copied(tokens + n, width, size) + _copied(n, 1, size) for n in (q, kv)
    )  # of x, weight, bias
    projected = tokens * (q + 2 * kv) * size
    moments = [
        tokens * q * size + copies_q,
        projected + copies_kv,
        # q, k and v; the output of the mix and its copy in the order of the tokens; or the last product.
        projected + 2 * tokens * q * size,
        projected + tokens * (q + width) * size + _copied(width, q + 1, size),
    ]
    if backbone.qk_norm != "none":  # the float32 norm of q, and its copy
        moments.append(projected + tokens * q * (4 + size))
    if backbone.positions == "rotary":
        # Four halves in float32. Both q and the rotated q are alive while k is rotated.
        turned = 8 * tokens * backbone.rotary_size
        moments += [
            projected + turned * attention.heads,
            projected + tokens * q * size + turned * attention.kv_heads,
        ]
    if extent.tokens > extent.sequences:
        # Keys and values repeated per query head, the mix, and the softmax statistics of a fused kernel.
        moments.append(projected + 3 * tokens * q * size + 4 * tokens * attention.heads)
    states = 2 if pre else 1  # of the residual stream and its norm
    # After the block, a norm holds the states before it, the sum and the result.
    return max(4 * tokens * width * states + max(moments), 4 * tokens * width * (2 if pre else 3))


def _cross_memory(width: int, memory_width: int, cross: CrossAttention, backbone: Backbone, context: Context) -> int:
    """The highest moment of a cross-attention block: the keys and values of the sources, the mix, or the output."""
    extent, size = context.output, context.bytes_per_value
    q, kv = backbone.widths(cross)
    tokens, read = extent.tokens, extent.sources * extent.read * cross.span
    kept = 0 if context.phase == "translate" else 2 * read * kv * size  # a translation's are in its cache
    repeated = 2 * read * q * size if cross.heads > cross.kv_heads else 0
    copies = _copied(read, memory_width, size) + 2 * _copied(kv, memory_width + 1, size)
    moments = [
        2 * read * kv * size + copies,
        kept + repeated + tokens * q * size + _copied(tokens + q, width, size) + _copied(q, 1, size),
        kept + repeated + 3 * tokens * q * size + 4 * tokens * cross.heads,
        kept + tokens * (q + width) * size + _copied(width, q + 1, size),
    ]
    states = 3 if backbone.norm_place == "pre" else 2  # before attention, after it, and their norm
    return 4 * tokens * width * states + max(*moments, 4 * tokens * width)


def _copies_rows(part: FeedForward, extent: Extent, size: int) -> bool:
    """Whether the rows of a token's experts are copied into one buffer, which outlives the layer."""
    whole = extent.implementation == "torch" and size == 4  # no copies in another type
    return part.router is not None and whole and gathers_rows(extent.tokens, part.expert_sizes)


def _routing_memory(part: FeedForward, use: LayerUse, extent: Extent) -> float:
    """What a layer's routing keeps until the pass ends: per pair its token, expert and weight, and the softmax."""
    if part.router is None:
        return 0
    pairs = extent.tokens * (part.router.max_experts if extent.implementation == "triton" else use.pairs)
    return 20 * pairs + 4 * extent.tokens * (part.experts + 1) + 8 * (part.experts + 1)


def _feed_forward_memory(
    width: int, part: FeedForward, use: LayerUse, backbone: Backbone, extent: Extent, size: int
) -> float:
    """The highest moment of a feed-forward block beside what its routing keeps."""
    if not part.experts:
        return 0
    tokens, biased = extent.tokens, backbone.biases == "all"
    pre = backbone.norm_place == "pre"
    states = 4 * tokens * width
    output = tokens * width * size
    copy = _copied(tokens, width, size)  # of the input
    hidden_copies = 3 if backbone.gated else 2

    def weights(neurons: int) -> int:
        return _copied(neurons, backbone.matrices * width + biased, size)

    def dense(neurons: int) -> int:
        return output + hidden_copies * tokens * neurons * size + weights(neurons)

    # The states before the attention, after it, and their norm.
    block = (3 if pre else 2) * states
    if part.router is None:
        moments: list[float] = [dense(part.neurons)]
    else:
        routed: float = output
        if extent.implementation == "triton":
            routed += triton_bytes(tokens, width, part.expert_sizes, part.router.max_experts, size)
        else:
            pairs, hidden = tokens * use.pairs, tokens * use.largest_neurons * size
            first, second = part.expert_sizes[:2]
            if _copies_rows(part, extent, size):
                # The numbers of the copied rows, and those of all experts' rows.
                routed += 8 * (use.neurons + sum(part.expert_sizes) + 2 * part.experts)
            routed += gathered_values(pairs, tokens * use.largest_pairs, width) * size + _copied(1, 1, size) * pairs
            # Hidden values of the expert before are alive while the next expert's weights are copied.
            routed += max(
                hidden_copies * hidden + weights(first), (hidden_copies - 1) * hidden + weights(first + second)
            )
        moments = [routed, output + dense(part.shared_size), 3 * output]
        # While routing: logits, the scores left to choose from, what is chosen; ranks, positions and loads per token.
        moments.append(tokens * (9 * part.experts + 40) - copy)
        if hidden := part.router.hidden(width):  # the linear layer's logits beside it, before and after its activation
            moments.append(4 * tokens * (part.experts + 2 * hidden) - copy)
            moments.append(4 * tokens * (2 * part.experts + hidden) - copy)
    result = states if biased else output  # adding a float32 bias gives float32
    if biased:
        moments.append(output + result)
    # After the block, the sum, and in a post-norm network its norm.
    after = (3 if pre else 4) * states + result
    return max(block + copy + max(moments), after)
