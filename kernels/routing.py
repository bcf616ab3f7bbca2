"""Router logits to a ``Routing``: probabilities in float32, top-k or threshold choice, ties by order, sorted pairs."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.kernels.layout import Routing

Score = Literal["softmax", "mass"]
PairWeights = Literal["sum", "softmax", "one"]

_LOOP = 8
"""Most experts per token that are chosen one by one; more are chosen by sorting."""


def route(
    logits: Tensor,
    *,
    max_experts: int,
    threshold: float | None = None,
    score: Score = "softmax",
    weights: PairWeights = "sum",
) -> Routing:
    """Choose experts for each token.

    Parameters
    ----------
    logits : [T, E], any float dtype; probabilities are float32.
    max_experts : the largest number of experts a token may use.
    threshold : None for top-k (exactly ``max_experts`` experts). Otherwise experts are kept in decreasing order of
        probability while the mass ranked strictly ahead is below ``threshold``; the first is always kept (XMoE,
        arXiv 2403.18926). Ties go to the lower index.
    score : how logits become probabilities. ``softmax``, or ``mass``: each is a prediction of the expert's activation
        mass, so its share of the positive ones is its probability.
    weights : ``sum`` divides the probabilities of a token's experts by their sum, so that the scale of the output does
        not depend on the number of experts. If a token has one expert, its weight is 1, and its logit gets the
        gradient of log p (straight-through): the quotient has gradient 0, so the router would not learn. ``softmax``
        uses the probabilities as weights. ``one`` adds the experts as they are, as the parts of one dense layer
        (MoEfication, arXiv 2110.01786).
    """
    probabilities = _softmax(logits.float()) if score == "softmax" else _shares(logits.float())
    choose = _choose if max_experts <= _LOOP else _choose_sorted
    chosen = choose(probabilities.detach(), max_experts, threshold)  # [T, E]
    pair_expert, pair_token = chosen.t().nonzero(as_tuple=True)
    offsets = torch.searchsorted(pair_expert, torch.arange(logits.shape[1] + 1, device=logits.device))
    values = probabilities
    if weights == "one":
        values = torch.ones_like(probabilities)
    elif weights == "sum":
        total = (probabilities * chosen).sum(-1, keepdim=True)
        if threshold is not None:
            total = torch.where(chosen.sum(-1, keepdim=True) == 1, total.detach(), total)
        elif max_experts == 1:
            total = total.detach()
        values = probabilities / total
    return Routing(pair_token, offsets, values[pair_token, pair_expert], probabilities)


def _softmax(logits: Tensor) -> Tensor:
    """Over the experts. Below 16 experts torch takes up to seven times as long, since they do not fill a register."""
    return logits.t().softmax(0).t() if logits.shape[1] < 16 else logits.softmax(-1)


def _shares(masses: Tensor) -> Tensor:
    """Each expert's share of the positive masses [T, E]; of a token without any, all are equal."""
    masses = masses.clamp(min=0)
    total = masses.sum(-1, keepdim=True)
    return torch.where(total > 0, masses / total.clamp(min=torch.finfo(masses.dtype).tiny), 1 / masses.shape[1])


def _choose(probabilities: Tensor, max_experts: int, threshold: float | None) -> Tensor:
    """[T, E] whether a token uses an expert: takes the largest remaining probability ``max_experts`` times.

    ``max`` returns the first of equal values, as a stable sort would. Sorting 32 experts takes five times as long for
    top-2.
    """
    left, chosen = probabilities, torch.zeros_like(probabilities, dtype=torch.bool)
    ahead = probabilities.new_zeros(0)
    for rank in range(min(max_experts, left.shape[1])):
        share, expert = left.max(-1, keepdim=True)
        if threshold is None or rank == 0:
            chosen.scatter_(1, expert, value=True)
        else:
            chosen.scatter_(1, expert, ahead.float() < threshold)
        if rank + 1 < max_experts:
            left = left.scatter(1, expert, -1) if rank == 0 else left.scatter_(1, expert, -1)
            if threshold is not None:  # summed in float64: float32 would round at each step and break ties
                ahead = share.double() if rank == 0 else ahead.add_(share)
    return chosen


def _choose_sorted(probabilities: Tensor, max_experts: int, threshold: float | None) -> Tensor:
    """The same as ``_choose``, in a time that does not depend on ``max_experts``."""
    shares, experts = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(probabilities, dtype=torch.bool)
    kept[:, :max_experts] = True
    if threshold is not None:
        ahead = shares.double().cumsum(-1)[:, :-1]
        kept[:, 1:] &= ahead.float() < threshold
    return torch.zeros_like(kept).scatter_(1, experts, kept)
