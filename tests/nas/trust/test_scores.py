"""Paired differences over seeds and sequences: known cases, and how often their intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from moesaic.nas.trust.scores import Difference, difference_over_seeds, paired_difference
from moesaic.supernet import Evaluation

differences = arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(-3, 3))


def evaluation(*sequence_losses: float) -> Evaluation:
    return Evaluation(float(np.mean(sequence_losses)), 0.1, 100, (), sequence_losses)


def test_with_one_seed_it_is_the_paired_t_test_over_sequences():
    mine, other = evaluation(3.0, 4.0, 5.0), evaluation(2.9, 3.8, 4.7)
    one = difference_over_seeds([mine], [other])
    assert one == paired_difference(mine, other)
    interval = stats.t.interval(0.95, 2, loc=0.2, scale=stats.sem([0.1, 0.2, 0.3]))
    p_value = stats.ttest_rel(mine.sequence_losses, other.sequence_losses).pvalue
    assert (one.mean, one.low, one.high, one.p_value, one.seeds) == pytest.approx((0.2, *interval, p_value, 1))


def test_where_all_sequences_agree_it_is_the_paired_t_test_over_seeds():
    seeds = np.array([0.2, 0.05, 0.11])
    found = Difference.of(np.repeat(seeds[:, None], 7, axis=1))
    interval = stats.t.interval(0.95, 2, loc=seeds.mean(), scale=stats.sem(seeds))
    p_value = stats.ttest_1samp(seeds, 0).pvalue
    assert (found.low, found.high, found.p_value, found.seeds) == pytest.approx((*interval, p_value, 3))


def test_where_all_seeds_agree_it_is_the_paired_t_test_over_sequences():
    sequences = np.array([0.1, 0.3, -0.2, 0.15])
    found = Difference.of(np.tile(sequences, (3, 1)))
    interval = stats.t.interval(0.95, 3, loc=sequences.mean(), scale=stats.sem(sequences))
    assert (found.low, found.high) == pytest.approx(interval)


@given(differences)
def test_a_difference_is_significant_exactly_where_its_interval_leaves_out_zero(values):
    found = Difference.of(values)
    assert found.low <= found.mean <= found.high
    assert 0 <= found.p_value <= 1
    if abs(found.p_value - 0.05) > 1e-6 and found.standard_error > 1e-9:
        assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)
    mirrored = Difference.of(-values)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("of_seeds", "of_sequences"), [(0.02, 0.0), (0.02, 0.1), (0.0, 0.3)])
def test_the_interval_covers_other_seeds_and_other_sequences(seeds, of_seeds, of_sequences):
    rng, inside = np.random.default_rng(0), []
    for _ in range(800):
        noise = of_seeds * rng.normal(size=(seeds, 1)) + of_sequences * rng.normal(size=(1, 64))
        found = Difference.of(0.05 + noise + 0.1 * rng.normal(size=(seeds, 64)))
        inside.append(found.low <= 0.05 <= found.high)
    assert np.mean(inside) > 0.92


def test_an_interval_over_sequences_alone_is_no_statement_about_training():
    """Two equal models whose trainings differ by as much as the demonstration's: a "significant" difference of one
    seed is chance more often than not."""
    rng = np.random.default_rng(0)
    found = [Difference.of(0.02 * rng.normal() + 0.04 * rng.normal(size=(1, 64))) for _ in range(400)]
    assert np.mean([one.p_value < 0.05 for one in found]) > 0.5
