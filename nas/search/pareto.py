"""Dominance, fronts, crowding and hypervolume of points to be minimised. Pure functions on arrays [n, objectives]."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np


def non_dominated(points: np.ndarray) -> np.ndarray:
    """[n] True where no other point is at least as good in everything and better in something.

    In lexicographic order no point is dominated by a later one, so each is compared with the front so far alone.
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


def ranks(points: np.ndarray) -> np.ndarray:
    """[n] 0 for the front, 1 for the front of the rest, and so on (NSGA-II, Deb et al. 2002)."""
    unique, inverse = np.unique(points, axis=0, return_inverse=True)
    if points.shape[1] == 2:
        return _ranks_of_pairs(unique)[inverse.ravel()]
    result = np.full(len(unique), -1)
    rank = 0
    while (left := result < 0).any():
        index = np.flatnonzero(left)
        result[index[non_dominated(unique[index])]] = rank
        rank += 1
    return result[inverse.ravel()]


def _ranks_of_pairs(pairs: np.ndarray) -> np.ndarray:
    """``ranks`` of different points with two coordinates in lexicographic order, in n log n (Jensen 2003): a front
    dominates a point exactly if its last one does."""
    last: list[float] = []
    result = np.empty(len(pairs), dtype=int)
    for i, value in enumerate(pairs[:, 1].tolist()):
        rank = bisect_right(last, value)
        result[i] = rank
        last[rank : rank + 1] = [value]
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
