"""Which models differ: against scipy, by brute force, and where the answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from moesaic.nas.trust.significance import adjusted_p_values, holm, levels, paired_p_values

p_values_of = arrays(float, st.integers(0, 8), elements=st.floats(0, 1))


def text_and_models(seed: int, models: int, sequences: int = 40) -> np.ndarray:
    """Losses [models, sequences] of equally good models: hard and easy text that all share, and a noise of each."""
    rng = np.random.default_rng(seed)
    return 3 + 0.5 * rng.normal(size=sequences) + 0.02 * rng.normal(size=(models, sequences))


def test_p_values_are_those_of_paired_t_tests():
    losses = text_and_models(0, 5, 7)
    found = paired_p_values(losses)
    for i in range(5):
        for j in range(5):
            expected = 1.0 if i == j else stats.ttest_rel(losses[i], losses[j]).pvalue
            assert found[i, j] == pytest.approx(expected)


@given(p_values_of, st.sampled_from([0.01, 0.05, 0.5]))
def test_holm_rejects_step_by_step(p_values, level):
    left = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = set()
    while left and p_values[left[0]] * len(left) < level:
        rejected.add(left.pop(0))
    adjusted = holm(p_values)
    assert set(np.flatnonzero(adjusted < level)) == rejected
    assert (adjusted >= p_values).all()
    assert (adjusted <= 1).all()


@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(deadline=None)
def test_equal_models_are_never_told_apart_and_a_constant_far_above_the_noise_always_is(seed, models):
    losses = text_and_models(seed, models)
    losses[1] = losses[0]
    assert adjusted_p_values(losses)[0, 1] == 1
    losses[1] = losses[0] + 1.0
    adjusted = adjusted_p_values(losses)
    assert (adjusted[1] < 0.05).sum() == models - 1
    assert (adjusted == adjusted.T).all()
    assert (np.diag(adjusted) == 1).all()


def test_models_that_are_equally_good_are_seldom_told_apart_though_the_best_is_picked_by_the_same_losses():
    fronts = 400
    false = 0
    for seed in range(fronts):
        losses = text_and_models(seed, 8)
        losses = losses[np.argsort(losses.mean(1))]
        differ = adjusted_p_values(losses) < 0.05
        false += differ[0].any() or np.diagonal(differ, 1).any() or levels(differ)[-1] > 1
    assert false <= stats.binom.ppf(0.999, fronts, 0.05)


def test_levels_start_where_a_model_differs_from_the_first_of_the_level():
    means = np.array([0.0, 0.1, 0.25, 0.3, 0.45, 0.9])
    assert levels(np.abs(means[:, None] - means) > 0.2) == [1, 1, 2, 2, 2, 3]
    assert levels(np.zeros((3, 3), dtype=bool)) == [1, 1, 1]
    assert levels(np.array([[False]])) == [1]
