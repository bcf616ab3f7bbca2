"""From router logits to a ``Routing``: softmax in float32, top-k or threshold choice, stable order, sorted pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layout import Routing


def route(logits: Tensor, *, most: int, threshold: float | None = None, normalise: bool = True) -> Routing:
    """Choose experts for each token.

    Parameters
    ----------
    logits : [T, E], any float dtype; the softmax is taken in float32.
    most : the largest number of experts a token may use.
    threshold : None for top-k (exactly ``most`` experts). Otherwise experts in falling order of probability are
        kept while the mass ranked strictly ahead is below ``threshold``; the first is always kept (XMoE,
        arXiv 2403.18926). Equal probabilities keep the order of the experts.
    normalise : divide the weights of a token's experts by their sum, so that the scale of the output does not
        depend on how many experts there are. Where a token has one expert its weight is 1, and the gradient of
        its logit is that of log p (straight-through): a plain quotient would have none and the router would not
        learn. False leaves the probabilities as they are.
    """
    experts = logits.shape[1]
    probabilities = logits.float().softmax(-1)
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)  # [T, E]
    keep = torch.zeros_like(ranked, dtype=torch.bool)
    keep[:, :most] = True
    if threshold is not None:
        # Summed over the experts ahead alone: "cumsum - own" rounds twice and breaks ties (E = 3, threshold = 2/3).
        keep[:, 1:] &= ranked.cumsum(-1)[:, :-1] < threshold
    chosen = torch.zeros_like(keep).scatter_(1, order, keep)  # [T, E], by expert again
    pair_expert, pair_token = chosen.t().nonzero(as_tuple=True)
    offsets = torch.zeros(experts + 1, dtype=torch.int64, device=logits.device)
    offsets[1:] = chosen.sum(0).cumsum(0)
    weights = probabilities[pair_token, pair_expert]
    if normalise:
        kept = probabilities * chosen
        total = torch.where(chosen.sum(-1) == 1, kept.detach().sum(-1), kept.sum(-1))
        weights = weights / total[pair_token]
    return Routing(pair_token, offsets, weights, probabilities)
