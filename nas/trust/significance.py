"""Which models differ significantly in loss: paired tests over the sequences that all were evaluated on."""

from __future__ import annotations

import numpy as np
from scipy import stats

LEVEL = 0.05
"""A difference is called significant where its p-value is below this."""


def adjusted_p_values(losses: np.ndarray) -> np.ndarray:
    """[m, m] Holm-adjusted p-values of the paired t-tests between all pairs of m models, from ``losses`` [m, n].

    All pairs are one family. So the family-wise error rate holds for any pairs looked at afterwards (the best against
    the others, neighbours), even though the best was found by these same losses. The selection of the m models from
    many more is not accounted for.
    """
    upper = np.triu_indices(len(losses), 1)
    adjusted = np.ones((len(losses), len(losses)))
    adjusted[upper] = holm(paired_p_values(losses)[upper])
    return np.minimum(adjusted, adjusted.T)


def paired_p_values(losses: np.ndarray) -> np.ndarray:
    """[m, m] two-sided p-values of paired t-tests between models, from ``losses`` [m, n] on the same n >= 2 sequences.

    What two models share (easy and hard text) cancels in their differences. Sequences are treated as independent.
    Training-seed variance is not included. Models with equal losses have p = 1.
    """
    return np.array([_p_values(losses - model) for model in losses])


def _p_values(differences: np.ndarray) -> np.ndarray:
    count = differences.shape[1]
    mean, error = differences.mean(1), differences.std(1, ddof=1) / count**0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(mean) / error
    return np.where(mean == 0, 1.0, 2 * stats.t.sf(t, count - 1))


def holm(p_values: np.ndarray) -> np.ndarray:
    """[k] adjusted p-values of k tests by Holm's step-down procedure (1979)."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)), 1)
    return adjusted


def levels(differ: np.ndarray) -> list[int]:
    """[m] from 1: the level of each model, given in rising order of loss with ``differ`` [m, m] of their pairs.

    A model starts a new level when it differs from the first of the current one.
    """
    found: list[int] = []
    first, level = 0, 1
    for index in range(len(differ)):
        if differ[first, index]:
            first, level = index, level + 1
        found.append(level)
    return found
