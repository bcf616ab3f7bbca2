"""Fronts and hypervolume of points to be minimised. Pure functions on arrays [n, objectives]."""

from __future__ import annotations

import numpy as np


def non_dominated(points: np.ndarray) -> np.ndarray:
    """[n] True where no other point is at least as good in every objective and better in one.

    In lexicographic order no point is dominated by a later one, so each is compared only with the front so far.
    """
    kept = np.zeros(len(points), dtype=bool)
    front = np.empty_like(points)
    size = 0
    for i in np.lexsort(points.T[::-1]):
        rivals, point = front[:size], points[i]
        if not ((rivals <= point).all(1) & (rivals < point).any(1)).any():
            kept[i], front[size] = True, point
            size += 1
    return kept


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume dominated by ``points`` below ``reference``, by slicing along the last objective."""
    points = points[(points < reference).all(1)]
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(reference[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    edges = np.append(points[:, -1], reference[-1])
    volume = 0.0
    for i in range(len(points)):
        if (height := edges[i + 1] - edges[i]) > 0:
            volume += height * hypervolume(points[: i + 1, :-1], reference[:-1])
    return volume


def evenly_spread(points: np.ndarray, count: int) -> list[int]:
    """Indices of ``count`` points of a front, evenly spread along it and with both ends, in rising first objective."""
    order = np.argsort(points[:, 0], kind="stable")
    if count >= len(order):
        return order.tolist()
    if count == 1:
        return [int(order[0])]
    scale = np.ptp(points, axis=0)
    steps = np.abs(np.diff(points[order], axis=0)) / np.where(scale > 0, scale, 1)
    along = np.concatenate([[0.0], steps.sum(1).cumsum()])
    chosen: list[int] = []
    for target in np.linspace(0, along[-1], count):
        free = [i for i in range(len(order)) if i not in chosen]
        chosen.append(min(free, key=lambda i, t=target: abs(along[i] - t)))
    return [int(order[i]) for i in sorted(chosen)]
