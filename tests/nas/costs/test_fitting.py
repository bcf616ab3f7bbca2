import json
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.nas.costs.latency.fitting import Accuracy, Drift, Interval, fit, informative, leave_one_out

SEEDS = st.integers(0, 10_000)


def problem(seed: int, rows: int = 40, columns: int = 6) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Terms of very different size, and coefficients of which a third are 0."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-3, 9, columns)
    truth = rng.uniform(0.5, 2.0, columns) / size * (np.arange(columns) % 3 > 0)
    return rng, rng.uniform(0.1, 1.0, (rows, columns)) * size, truth


@given(SEEDS)
def test_a_fit_finds_the_coefficients_of_measurements_without_noise(seed):
    _, terms, truth = problem(seed)
    found = fit(terms, terms @ truth)
    assert found * terms.max(axis=0) == pytest.approx(truth * terms.max(axis=0), rel=1e-6, abs=1e-9)


@given(SEEDS, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_a_fit_does_not_depend_on_units(seed, unit_of_time, unit_of_weight):
    rng, terms, truth = problem(seed)
    measured = terms @ truth * rng.lognormal(0, 0.1, len(terms))
    weights = rng.uniform(0.1, 3, len(terms))
    units = 10.0 ** rng.uniform(-5, 5, terms.shape[1])
    plain = terms @ fit(terms, measured, weights)
    scaled = terms * units @ fit(terms * units, measured * unit_of_time, weights * unit_of_weight)
    assert scaled == pytest.approx(plain * unit_of_time, rel=1e-6)


@given(SEEDS)
def test_no_coefficients_are_negative_or_better(seed):
    rng, terms, truth = problem(seed)
    measured = terms @ truth * rng.lognormal(0, 0.3, len(terms))
    weights = rng.uniform(0, 3, len(terms))

    def loss(coefficients):
        return float(weights @ np.square(terms @ coefficients / measured - 1))

    found = fit(terms, measured, weights)
    assert (found >= 0).all()
    for _ in range(20):
        nearby = np.maximum(found + rng.normal(0, 0.05, len(found)) / terms.max(axis=0), 0)
        assert loss(found) <= loss(nearby) + 1e-12


def test_a_weight_counts_as_often_as_its_row_is_repeated():
    rng, terms, truth = problem(3)
    measured = terms @ truth * rng.lognormal(0, 0.2, len(terms))
    weights = rng.integers(0, 4, len(terms))
    repeated = np.repeat(np.arange(len(terms)), weights)
    assert terms @ fit(terms, measured, weights) == pytest.approx(terms @ fit(terms[repeated], measured[repeated]))


def test_a_term_that_never_occurs_costs_nothing_and_a_measurement_of_zero_is_refused():
    _, terms, truth = problem(0)
    measured = terms @ truth
    terms[:, 0] = 0.0
    assert fit(terms, measured)[0] == 0.0
    with pytest.raises(ValueError, match="positive"):
        fit(terms, np.zeros(len(terms)))


def test_a_row_left_out_has_no_part_in_its_prediction():
    rng, terms, truth = problem(1)
    measured = terms @ truth * rng.lognormal(0, 0.1, len(terms))
    before = leave_one_out(terms, measured)
    assert before[5] == pytest.approx(terms[5] @ fit(np.delete(terms, 5, axis=0), np.delete(measured, 5)))
    disturbed = measured.copy()
    disturbed[5] *= 3
    after = leave_one_out(terms, disturbed)
    assert after[5] == before[5]
    assert not np.allclose(np.delete(after, 5), np.delete(before, 5))


def tau_by_enumeration(predicted, measured) -> tuple[float, int]:
    signs = [
        np.sign(predicted[i] - predicted[j]) * np.sign(measured[i] - measured[j])
        for i, j in combinations(range(len(predicted)), 2)
    ]
    return float(np.mean(signs)), len(signs)


@given(SEEDS)
def test_accuracy_agrees_with_enumeration(seed):
    rng = np.random.default_rng(seed)
    depths = rng.integers(1, 5, 30)
    measured = depths * 10 + rng.normal(0, 1, 30)
    predicted = measured + rng.normal(0, 1, 30)
    accuracy = Accuracy.of(predicted, measured, depths)
    errors = predicted / measured - 1
    assert accuracy.count == 30
    assert accuracy.rmse**2 == pytest.approx(sum((predicted - measured) ** 2) / 30)
    assert accuracy.mape == pytest.approx(sum(abs(errors)) / 30)
    assert accuracy.bias == pytest.approx(sum(errors) / 30)
    assert accuracy.within_5_percent == pytest.approx(sum(abs(e) <= 0.05 for e in errors) / 30)
    assert accuracy.within_10_percent == pytest.approx(sum(abs(e) <= 0.10 for e in errors) / 30)
    assert accuracy.tau == pytest.approx(tau_by_enumeration(predicted, measured)[0])
    groups = [depths == d for d in set(depths.tolist()) if (depths == d).sum() >= 3]
    taus = [tau_by_enumeration(predicted[g], measured[g]) for g in groups]
    assert accuracy.tau_within_depth == pytest.approx(sum(t * n for t, n in taus) / sum(n for _, n in taus))


@given(SEEDS)
def test_ranks_do_not_depend_on_the_scale_of_predictions(seed):
    rng = np.random.default_rng(seed)
    measured, predicted = rng.uniform(1, 2, 12), rng.uniform(1, 2, 12)
    plain, bent = Accuracy.of(predicted, measured), Accuracy.of(predicted**3 * 7, measured)
    assert (plain.spearman, plain.tau) == pytest.approx((bent.spearman, bent.tau))


@pytest.mark.filterwarnings("error")
def test_accuracy_is_defined_where_ranks_are_not():
    measured = np.array([1.0, 2.0, 3.0, 4.0])
    tied = Accuracy.of(np.full(4, 2.0), measured, np.array([1, 1, 1, 2]))
    assert (tied.spearman, tied.tau, tied.tau_within_depth) == (0.0, 0.0, 0.0)
    assert Accuracy.of(measured, measured, np.array([1, 1, 2, 2])).tau_within_depth is None
    assert Accuracy.of(measured, measured).tau_within_depth is None
    one = Accuracy.of(np.array([2.0]), np.array([1.0]))
    assert (one.count, one.mape, one.tau) == (1, 1.0, 0.0)
    json.dumps(asdict(tied), allow_nan=False)
    with pytest.raises(ValueError, match="0 measurements"):
        Accuracy.of(np.array([]), np.array([]))


RESIDUALS = {
    "normal": lambda rng, shape: rng.normal(0, 0.03, shape),
    "biased": lambda rng, shape: rng.normal(0.05, 0.03, shape),
    "heavy tails": lambda rng, shape: 0.02 * rng.standard_t(3, shape),
    "Laplace": lambda rng, shape: rng.laplace(0, 0.02, shape),
    "skew": lambda rng, shape: 0.03 * rng.gamma(2, 1, shape),
    "outliers": lambda rng, shape: rng.normal(0, 0.02, shape) + 0.15 * (rng.random(shape) < 0.03),
}


@pytest.mark.parametrize("count", [30, 37, 45, 60])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_the_interval_holds_as_many_new_models_as_it_says(kind, count):
    rng = np.random.default_rng(0)
    covered = []
    for residuals, fresh in zip(RESIDUALS[kind](rng, (1000, count)), RESIDUALS[kind](rng, (1000, 200)), strict=True):
        low, high = Interval.of(residuals).around(7.0)
        covered.append(((7.0 * np.exp(fresh) >= low) & (7.0 * np.exp(fresh) <= high)).mean())
    assert 0.94 <= np.mean(covered) <= 0.965


def test_few_residuals_give_a_wider_interval_not_none():
    rng = np.random.default_rng(0)
    covered = []
    for sample in rng.normal(0, 0.03, (2000, 8)):
        interval = Interval.of(sample)
        covered.append(interval.low <= np.exp(rng.normal(0, 0.03)) <= interval.high)
    assert 0.935 <= np.mean(covered) <= 0.965
    with pytest.raises(ValueError, match="at least 2"):
        Interval.of(np.array([0.1]))


def test_an_interval_is_plain_numbers_and_scales_with_the_prediction():
    interval = Interval.of(np.random.default_rng(0).normal(0.02, 0.03, 40))
    assert Interval(**json.loads(json.dumps(asdict(interval)))) == interval
    assert interval.around(20.0) == pytest.approx([2 * end for end in interval.around(10.0)])


def walk(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.cumsum(rng.normal(0, 0.01, count))


@pytest.mark.parametrize("seed", range(8))
def test_drift_is_recovered_through_noise_and_outliers(seed):
    """A Kalman smoother that knew both variances would be off by 0.0099 without outliers."""
    rng, times = np.random.default_rng(seed), np.arange(300)
    truth = walk(rng, 300)
    seen = truth + rng.normal(0, 0.02, 300) + 0.5 * (rng.random(300) < 0.05)
    errors = np.log(Drift.of(times, seen).factor(times)) - truth
    assert np.sqrt(np.square(errors).mean()) < 0.014


def test_no_drift_is_invented_from_noise():
    invented = 0
    for seed in range(40):
        rng, times = np.random.default_rng(seed), np.arange(100)
        drift = Drift.of(times, rng.normal(0, 0.03, 100))
        invented += np.isfinite(drift.width)
        assert np.ptp(np.log(drift.factor(times))) < 0.06
    assert invented <= 6


def test_a_step_stays_sharp_and_one_disturbed_measurement_is_not_drift():
    rng, times = np.random.default_rng(0), np.arange(200)
    truth = np.where(times < 100, 0.0, 0.2)
    seen = truth + rng.normal(0, 0.01, 200)
    seen[50] += 1.0
    factor = Drift.of(times, seen).factor(times)
    assert np.log(factor) == pytest.approx(truth, abs=0.03)


@given(SEEDS, st.floats(-1, 1), st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_drift_does_not_depend_on_units(seed, level, unit, start):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, 10, 25))
    seen = walk(rng, 25) * 3 + rng.normal(0, 0.01, 25)
    plain = Drift.of(times, seen).factor(times)
    order = rng.permutation(25)
    moved = Drift.of(times[order] * unit + start, seen[order] + level)
    assert moved.factor(times * unit + start) == pytest.approx(plain * np.exp(level), rel=1e-4)


def test_drift_holds_its_last_level_beyond_the_measurements_and_across_gaps():
    rng = np.random.default_rng(0)
    times = np.concatenate([np.arange(50), [5000], 10_000 + np.arange(50)])
    seen = np.where(times < 5001, 0.0, 0.3) + rng.normal(0, 0.005, 101)
    drift = Drift.of(times, seen)
    beyond = np.log(drift.factor(np.array([-1e9, 49, 10_000, 1e9])))
    assert beyond == pytest.approx([0, 0, 0.3, 0.3], abs=0.02)


def test_few_measurements_have_one_factor():
    assert Drift.of(np.array([3.0]), np.array([0.1])).factor(np.array([0, 9])) == pytest.approx(np.exp([0.1, 0.1]))
    same = Drift.of(np.zeros(6), np.array([0.1, 0.1, 0.1, 0.1, 0.1, 5.0]))
    assert same.factor(np.array([0.0])) == pytest.approx(np.exp(0.1))
    with pytest.raises(ValueError, match="at least one"):
        Drift.of(np.array([]), np.array([]))


def test_rows_that_settle_a_coefficient_are_preferred_and_the_budget_is_kept():
    rng = np.random.default_rng(0)
    common, rare = rng.uniform(1, 2, (60, 3)), np.zeros((60, 1))
    rare[:6] = 1.0
    terms, seconds = np.hstack([common, rare]), np.full(60, 2.0)
    chosen = informative(terms, seconds, 20.0, fewest=4, most=60)
    assert len(chosen) == len(set(chosen)) == 10
    assert sum(row < 6 for row in chosen) >= 2  # of six rows among sixty, those alone tell of the last coefficient
    assert informative(terms, seconds, 0.0, fewest=4, most=60) == chosen[:4]
    assert informative(terms, seconds, 1e9, fewest=4, most=7) == chosen[:7]


def test_cheap_rows_are_preferred_where_they_tell_the_same():
    terms = np.repeat(np.eye(3), 2, axis=0)
    seconds = np.array([1.0, 9.0, 9.0, 1.0, 1.0, 9.0])
    scaled = terms * seconds[:, None]  # the same relative error
    assert set(informative(scaled, seconds, 3.0, fewest=1, most=6)) == {0, 3, 4}


def test_single_rows_are_left_out():
    rng = np.random.default_rng(1)
    terms = rng.uniform(0.5, 2, (12, 3))
    measured = terms @ np.array([1.0, 2.0, 3.0]) * np.exp(rng.normal(0, 0.1, 12))
    assert leave_one_out(terms, measured, np.array([3, 7])) == pytest.approx(leave_one_out(terms, measured)[[3, 7]])
