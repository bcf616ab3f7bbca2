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
    """Volume dominated by ``points`` below ``reference``: a sweep over two objectives, slices along any more."""
    points = points[(points < reference).all(1)]
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(reference[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    heights = np.diff(points[:, -1], append=reference[-1])
    if points.shape[1] == 2:
        return float(heights @ (reference[0] - np.minimum.accumulate(points[:, 0])))
    front, volume, area = points[:0, :-1], 0.0, 0.0
    for point, height in zip(points[:, :-1], heights, strict=True):
        if not (front <= point).all(1).any():
            front = np.vstack([front[~(point <= front).all(1)], point])
            area = hypervolume(front, reference[:-1])
        volume += height * area
    return volume


def hypervolumes(points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """[n] hypervolume of the first 1, 2, ... n points. Each adds its box less the part that the front has already."""
    front, volume, found = points[:0], 0.0, []
    for point in points:
        if not (front <= point).all(1).any():
            box = float(np.prod(np.maximum(reference - point, 0.0)))
            volume += max(0.0, box - hypervolume(np.maximum(front, point), reference))
            front = np.vstack([front[~(point <= front).all(1)], point])
        found.append(volume)
    return np.array(found)


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
