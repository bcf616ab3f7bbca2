"""Tuning the thresholds of a trained model so that its measured compute is inside the budget.

How many experts a threshold keeps depends on how sure a router is, and training changes that. A threshold may be
lowered after training (XMoE evaluates one model at several), so a model that grew over its budget is brought back.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moesaic.nas.search.budget import Budget
from moesaic.search_spaces import Architecture
from moesaic.supernet import Transformer, evaluate

_MARGIN = 0.005
"""Share of the budget left free: the load on other text differs a little."""
_HALVINGS = 7


def hold_budget(model: Transformer, windows: Tensor, budget: Budget) -> Architecture:
    """The model's architecture with all thresholds lowered by one factor, as little as brings every expected line of
    ``budget`` inside on ``windows`` [n, S + 1]; unchanged where it is inside already or no threshold helps."""
    architecture = model.architecture

    def inside(candidate: Architecture) -> bool:
        measured = budget.pricer.measured(candidate, evaluate(model, windows, candidate).loads)
        return max(budget.measured_excess(measured).values(), default=-1.0) <= -_MARGIN

    lowest = lower_thresholds(architecture, 0.0)
    if lowest == architecture or inside(architecture) or not inside(lowest):
        return architecture
    good, bad, best = 0.0, 1.0, lowest
    for _ in range(_HALVINGS):
        factor = (good + bad) / 2
        candidate = lower_thresholds(architecture, factor)
        if inside(candidate):
            good, best = factor, candidate
        else:
            bad = factor
    return best


def lower_thresholds(architecture: Architecture, factor: float) -> Architecture:
    """Every threshold times ``factor``; at 0 each token keeps one expert."""
    layers = []
    for layer in architecture.decoder.layers:
        part = layer.feed_forward
        if part.router is not None and part.router.threshold is not None:
            threshold = max(part.router.threshold * factor, 1e-6)
            part = replace(part, router=replace(part.router, threshold=threshold))
        layers.append(replace(layer, feed_forward=part))
    return replace(architecture, decoder=replace(architecture.decoder, layers=tuple(layers)))
