"""Lowers the thresholds of a trained model so that its measured compute is inside the budget.

How many experts a threshold keeps depends on how sure a router is, and training changes that. A threshold may be
lowered after training (XMoE evaluates one model at several), so a model that grew over its budget is brought back.
"""

from __future__ import annotations

from dataclasses import replace

from moesaic.nas.search.budget import Budget
from moesaic.search_spaces import Architecture
from moesaic.supernet import Judge

_MARGIN = 0.005
"""Share of the budget left free: the load on other text differs a little."""
_HALVINGS = 7


def lower_thresholds_to_fit(judge: Judge, budget: Budget) -> Architecture:
    """The architecture of ``judge``'s model with all thresholds lowered by one factor, as little as needed to bring
    every expected line of ``budget`` inside on its batch. Unchanged if it is inside already or no threshold helps."""
    architecture = judge.model.architecture

    def inside(candidate: Architecture) -> bool:
        measured = budget.pricer.measured(candidate, judge(candidate).loads)
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
    """Multiplies every threshold by ``factor``; at 0 each token keeps one expert."""
    changed = {}
    for slot, layer in architecture.layers.items():
        router = layer.feed_forward.router
        if router is not None and router.threshold is not None:
            router = replace(router, threshold=max(router.threshold * factor, 1e-6))
            changed[slot] = replace(layer, feed_forward=replace(layer.feed_forward, router=router))
    return architecture.with_layers(changed)
