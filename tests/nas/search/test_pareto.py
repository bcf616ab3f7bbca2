from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moesaic.nas.search.pareto import evenly_spread, hypervolume, non_dominated

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
