"""Rank correlation, regret and intervals against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.nas.trust.ranking import agreement, bootstrap, kendall_tau, mean_interval

marks = st.lists(st.integers(-50, 50), min_size=5, max_size=12, unique=True)


@given(marks, st.randoms())
def test_tau_counts_pairs_in_the_same_order(values, random):
    judged, truth = np.array(values, float), np.array(random.sample(values, len(values)), float)
    pairs = [(i, j) for i in range(len(values)) for j in range(i)]
    same = sum(math.copysign(1, (judged[i] - judged[j]) * (truth[i] - truth[j])) for i, j in pairs)
    assert kendall_tau(judged, truth) == pytest.approx(same / len(pairs))


def test_a_perfect_and_a_perverse_judge():
    truth = np.linspace(2, 3, 12)
    good, bad = agreement(truth**3, truth), agreement(-truth, truth)
    assert (good.tau, good.rho, good.tau_low, good.tau_high) == pytest.approx((1, 1, 1, 1))
    assert good.regret == {1: 0, 3: 0, 5: 0}
    assert bad.tau == pytest.approx(-1)
    assert bad.regret[1] == pytest.approx(0.5)
    assert bad.regret[3] == pytest.approx((3 - 2 / 11) / 2 - 1)


def test_a_judge_that_marks_all_alike_is_undefined():
    found = agreement(np.ones(6), np.arange(1.0, 7.0))
    assert (found.tau, found.tau_low, found.tau_high, found.rho) == (None,) * 4


def test_the_bootstrap_of_a_mean_is_near_its_normal_interval():
    values = np.random.default_rng(0).normal(5, 2, 200)
    low, high = bootstrap(lambda index: values[index].mean(), len(values))
    half = 1.96 * values.std(ddof=1) / 200**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)


def test_students_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [low <= 1 <= high for low, high in (mean_interval(rng.normal(1, 3, 3)) for _ in range(2000))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    assert mean_interval(np.array([4.0])) == (-math.inf, math.inf)
