from itertools import combinations

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moesaic.nas.search import pareto
from moesaic.nas.search.pareto import evenly_spread, hypervolume, hypervolumes, non_dominated

points_of = st.integers(1, 3).flatmap(
    lambda m: st.integers(1, 9).flatmap(lambda n: arrays(float, (n, m), elements=st.integers(0, 6).map(float)))
)


def dominates(a, b) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


@given(points_of)
@settings(deadline=None)
def test_the_front_is_what_nothing_dominates(points):
    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert non_dominated(points).tolist() == expected


@given(points_of)
@settings(deadline=None)
def test_hypervolume_is_the_union_of_boxes(points):
    reference = np.full(points.shape[1], 7.0)
    total = 0.0  # inclusion and exclusion over every subset of boxes
    for size in range(1, len(points) + 1):
        for chosen in combinations(points, size):
            total += (-1) ** (size + 1) * np.prod(reference - np.max(chosen, axis=0))
    assert hypervolume(points, reference) == pytest.approx(total)


def points_on_a_front(n: int, objectives: int, seed: int = 0) -> np.ndarray:
    """Random points near a sphere, so that many of them are on the front."""
    points = np.abs(np.random.default_rng(seed).normal(size=(n, objectives)))
    return 1 - 0.98 * points / np.linalg.norm(points, axis=1, keepdims=True) ** 0.9


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_is_that_of_moocore(objectives):
    points, reference = points_on_a_front(60, objectives), np.ones(objectives)
    assert hypervolume(points, reference) == pytest.approx(moocore.hypervolume(points, ref=reference))


@pytest.mark.parametrize(("objectives", "count"), [(1, 50), (2, 300), (3, 150), (4, 40)])
def test_hypervolumes_of_a_history_are_those_of_moocore(objectives, count):
    points, reference = points_on_a_front(count, objectives), np.full(objectives, 0.95)  # some are beyond it
    found = hypervolumes(points, reference)
    if objectives == 1:
        expected = 0.95 - np.minimum(np.minimum.accumulate(points[:, 0]), 0.95)
    else:
        expected = [moocore.hypervolume(points[: n + 1], ref=reference) for n in range(count)]
    assert found == pytest.approx(np.array(expected))


@given(points_of)
@settings(deadline=None)
def test_hypervolumes_grow_to_the_hypervolume(points):
    reference = np.full(points.shape[1], 5.0)
    found = hypervolumes(points, reference)
    assert found == pytest.approx(np.array([hypervolume(points[: n + 1], reference) for n in range(len(points))]))
    assert (np.diff(found) >= 0).all()


def test_a_history_of_ten_thousand_computes_few_volumes(monkeypatch):
    """Only what enters the front costs a sweep, and only over the front."""
    rng, seen = np.random.default_rng(0), []
    monkeypatch.setattr(
        pareto, "hypervolume", lambda points, reference: seen.append(len(points)) or hypervolume(points, reference)
    )
    pareto.hypervolumes(rng.random((10_000, 2)), np.ones(2))
    assert len(seen) < 300
    assert max(seen) < 60


def test_points_beyond_the_reference_do_not_count():
    assert hypervolume(np.array([[3.0, 1.0], [1.0, 9.0]]), np.array([4.0, 4.0])) == 3.0
    assert hypervolume(np.array([[5.0, 5.0]]), np.array([4.0, 4.0])) == 0.0


@given(st.integers(1, 8), st.integers(1, 12))
def test_a_spread_has_distinct_members_and_both_ends(count, size):
    points = np.column_stack([np.arange(size), np.arange(size)[::-1]]).astype(float)
    chosen = evenly_spread(points, count)
    assert len(set(chosen)) == len(chosen) == min(count, size)
    assert chosen[0] == 0
    if count > 1:
        assert chosen[-1] == size - 1
