"""Rank correlation, regret and intervals against their definitions."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.nas.trust.ranking import agreement, discordant_pairs, kendall_tau, mean_interval, tau_interval

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
    assert (good.tau, good.rho, good.tau_high) == pytest.approx((1, 1, 1))
    assert 0.7 < good.tau_low < 1
    assert good.regret == {1: 0, 3: 0, 5: 0}
    assert bad.tau == pytest.approx(-1)
    assert bad.regret[1] == pytest.approx(0.5)
    assert bad.regret[3] == pytest.approx((3 - 2 / 11) / 2 - 1)


def test_a_judge_that_marks_all_alike_is_undefined():
    found = agreement(np.ones(6), np.arange(1.0, 7.0))
    assert (found.tau, found.tau_low, found.tau_high, found.rho) == (None,) * 4


@pytest.mark.parametrize("steepness", [0.0, 0.7, -0.4])
def test_discordant_pairs_are_counted_as_an_enumeration_does(steepness):
    chances = np.zeros(11)
    for order in permutations(range(5)):
        discordant = sum(order[i] > order[j] for j in range(5) for i in range(j))
        chances[discordant] += math.exp(-steepness * discordant)
    assert discordant_pairs(5, steepness) == pytest.approx(chances / chances.sum())


def test_a_perfect_order_of_few_members_may_be_chance():
    """Four members are in order once in 24 times, more often than the 2.5 % that an end of the interval leaves out."""
    low, high = tau_interval(1.0, 4)
    assert low < 0
    assert high == 1
    assert tau_interval(1.0, 5)[0] > 0  # once in 120
    assert tau_interval(-1.0, 4) == pytest.approx((-high, -low))


@given(st.integers(2, 12), st.data())
@settings(deadline=None)
def test_an_interval_of_tau_holds_it_and_is_never_a_point(count, data):
    pairs = count * (count - 1) // 2
    tau = 1 - 2 * data.draw(st.integers(0, pairs)) / pairs
    low, high = tau_interval(tau, count)
    assert -1 <= low <= tau <= high <= 1
    assert high - low > 0.1
    assert tau_interval(-tau, count) == pytest.approx((-high, -low), abs=1e-6)


@pytest.mark.parametrize(("tau", "count"), [(0.0, 6), (0.7, 4), (0.7, 8), (0.9, 4), (0.9, 12)])
def test_the_interval_of_tau_covers_normal_marks_that_it_was_not_made_for(tau, count):
    """A percentile bootstrap covers the last but one in 24 % of draws."""
    rng, correlation = np.random.default_rng(0), math.sin(math.pi * tau / 2)
    known: dict[float, tuple[float, float]] = {}
    inside = []
    for _ in range(300):
        judged = rng.normal(size=count)
        truth = correlation * judged + math.sqrt(1 - correlation**2) * rng.normal(size=count)
        found = kendall_tau(judged, truth)
        low, high = known.setdefault(found, tau_interval(found, count))
        inside.append(low <= tau <= high)
    assert np.mean(inside) > 0.92


def test_students_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [low <= 1 <= high for low, high in (mean_interval(rng.normal(1, 3, 3)) for _ in range(2000))]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    assert mean_interval(np.array([4.0])) == (-math.inf, math.inf)
