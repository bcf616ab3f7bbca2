"""The order of a mixture's experts, and of the neurons in each: what is pruned first comes last.

Shapes: T tokens, N neurons, D width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.search_spaces import FeedForward
from moesaic.supernet.experts import SparseFeedForward
from moesaic.supernet.sparsify.neurons import contributions, hidden


def expert_order(layer: SparseFeedForward, part: FeedForward, read: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N] and experts [E] of a mixture in their new order.

    Experts by REAP's saliency (router weight times norm of the expert's output, a mean over all tokens,
    arXiv 2510.13999), largest first. An expert's neurons by the mean square of what they contribute to its tokens.
    The shared rows come first and keep their order.
    """
    routing, saliency, rows = layer.route(read, part), [], []
    start = part.shared_size
    for expert, size in enumerate(part.expert_sizes):
        pairs = slice(int(routing.offsets[expert]), int(routing.offsets[expert + 1]))
        tokens, weights = routing.tokens[pairs], routing.weights[pairs]
        own, down = hidden(layer, read[tokens], slice(start, start + size)), layer.down[start : start + size]
        saliency.append((weights * (own @ down).norm(dim=1)).sum())
        weighted = weights[:, None] * contributions(own, down)
        rows.append(start + weighted.square().sum(0).argsort(descending=True, stable=True))
        start += size
    experts = torch.stack(saliency).argsort(descending=True, stable=True)
    shared = torch.arange(part.shared_size, device=read.device)
    return torch.cat([shared, *(rows[expert] for expert in experts.tolist())]), experts
