"""What a search has found after each evaluation, as a share of the true front's hypervolume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesaic import Architecture, Budget, Evaluation, hypervolume, hypervolumes, non_dominated

MARGIN = 0.1
"""The reference point is the front's worst value of each objective plus this share of its range."""


@dataclass(frozen=True)
class Truth:
    """The front [n, (loss, FLOPs)] of all that is inside the budget by expected and measured costs, and its
    hypervolume."""

    front: np.ndarray
    reference: np.ndarray
    volume: float

    @staticmethod
    def of(points: np.ndarray) -> Truth:
        front = points[non_dominated(points)]
        reference = front.max(0) + MARGIN * np.ptp(front, axis=0)
        return Truth(front, reference, hypervolume(front, reference))


def point(budget: Budget, architecture: Architecture, evaluation: Evaluation) -> np.ndarray | None:
    """(loss, measured FLOPs), or None outside the budget."""
    measured = budget.pricer.measured(architecture, evaluation.loads)
    inside = budget.fits(architecture) and max(budget.measured_excess(measured).values(), default=-1.0) <= 0
    return np.array([evaluation.loss, measured["flops"]]) if inside else None


def shares(points: Sequence[np.ndarray | None], truth: Truth) -> np.ndarray:
    """[len(points)] share of the true hypervolume after each evaluation; None is an evaluation outside the budget."""
    inside = np.array([found is not None for found in points])
    volumes = hypervolumes(np.array([found for found in points if found is not None]), truth.reference)
    return np.append(0.0, volumes)[inside.cumsum()] / truth.volume


def needed(history: np.ndarray, share: float) -> float:
    """Evaluations until ``share`` is reached; infinite if it never is."""
    reached = np.flatnonzero(history >= share)
    return float(reached[0] + 1) if len(reached) else float("inf")
