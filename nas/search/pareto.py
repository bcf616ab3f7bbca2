"""Dominance, fronts, crowding and hypervolume of points to be minimised. Pure functions on arrays [n, objectives]."""

from __future__ import annotations

import numpy as np


def non_dominated(points: np.ndarray) -> np.ndarray:
    """[n] True where no other point is at least as good in everything and better in something."""
    at_least = (points[:, None, :] <= points[None, :, :]).all(-1)
    better = (points[:, None, :] < points[None, :, :]).any(-1)
    return np.logical_not((at_least & better).any(0))


def ranks(points: np.ndarray) -> np.ndarray:
    """[n] 0 for the front, 1 for the front of the rest, and so on (NSGA-II, Deb et al. 2002)."""
    result = np.full(len(points), -1)
    rank = 0
    while (left := result < 0).any():
        index = np.flatnonzero(left)
        result[index[non_dominated(points[index])]] = rank
        rank += 1
    return result


def crowding(points: np.ndarray) -> np.ndarray:
    """[n] crowding distance within one front; infinite at its ends (Deb et al. 2002)."""
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        span = values[order[-1]] - values[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0 and len(points) > 2:
            distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / span
    return distance


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


def spread(points: np.ndarray, count: int) -> list[int]:
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
