"""The statistics of a latency predictor: fitting its coefficients, judging them, and the drift of the machine.

Nothing here depends on what a term or a model is: rows are measurements, columns are terms, times are in any unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.stats import kendalltau, spearmanr, t


def fit(terms: np.ndarray, measured: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Non-negative coefficients [m] that minimise the sum over rows of ``weights * (predicted / measured - 1)**2``.

    ``terms`` is [n, m], ``measured`` [n] positive, ``weights`` [n] non-negative (default: all 1). Columns are scaled
    to a largest entry of 1 before they are solved for (counts of work differ by many powers of ten). Lawson and
    Hanson's active-set method. Raises ValueError for a measurement that is not positive or a value that is not finite.
    """
    if not (measured > 0).all():
        raise ValueError("a measurement must be positive")
    relative = terms / measured[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1.0  # a term that is zero in every row gets coefficient 0
    root = np.ones(len(measured)) if weights is None else np.sqrt(weights)
    solution, _ = nnls(relative / scale * root[:, None], root)
    return solution / scale


def leave_one_out(terms: np.ndarray, measured: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """The prediction of each of ``rows`` (default: all n) by a ``fit`` to all the others."""
    rows = np.arange(len(measured)) if rows is None else rows
    others = [np.arange(len(measured)) != row for row in rows]
    return np.array([terms[row] @ fit(terms[o], measured[o]) for row, o in zip(rows, others, strict=True)])


def informative(terms: np.ndarray, seconds: np.ndarray, budget: float, fewest: int, most: int) -> list[int]:
    """The rows of ``terms`` [n, m] to measure in ``budget`` seconds, of which row i takes ``seconds[i]``.

    Greedy D-optimal design (Fedorov 1972) for a fit to relative errors: next comes the row that adds most to the log
    determinant of the information matrix per second. So a coefficient that is settled gets few more rows. At least
    ``fewest`` and at most ``most`` rows, whatever the budget.
    """
    relative = terms / seconds[:, None]
    scale = relative.max(axis=0)
    rows = relative / np.where(scale == 0, 1.0, scale)
    covariance = np.eye(terms.shape[1]) * 1e6  # before anything is measured, nothing is known
    chosen: list[int] = []
    spent = 0.0
    while len(chosen) < min(most, len(rows)):
        gains = np.log1p(np.einsum("ij,jk,ik->i", rows, covariance, rows)) / seconds
        gains[chosen] = -np.inf
        best = int(gains.argmax())
        spent += seconds[best]
        if spent > budget and len(chosen) >= fewest:
            break
        chosen.append(best)
        moved = covariance @ rows[best]
        covariance -= np.outer(moved, moved) / (1 + rows[best] @ moved)
    return chosen


@dataclass(frozen=True)
class Accuracy:
    """Errors of predictions on held-out measurements.

    ``rmse`` has the unit of the measurements; ``mape`` and ``bias`` are fractions of the measured value, the shares
    within 5 and 10 percent are fractions of 1. ``spearman`` and ``tau`` (Kendall's tau-b) are 0 where they are
    undefined, because all predictions or all measurements tie. ``tau_within_depth`` is the mean of the taus of models
    of equal depth, weighted by their number of pairs: depth alone orders most models, so this tells whether the rest is
    predicted too. It is None where depths were not given or none has three members.
    """

    count: int
    rmse: float
    mape: float
    bias: float
    within_5_percent: float
    within_10_percent: float
    spearman: float
    tau: float
    tau_within_depth: float | None

    @staticmethod
    def of(predicted: np.ndarray, measured: np.ndarray, depths: np.ndarray | None = None) -> Accuracy:
        """``predicted`` and ``measured`` are [n], n >= 1, in one unit; ``depths`` [n] are numbers of layers."""
        if len(predicted) != len(measured) or not len(measured):
            raise ValueError(f"{len(predicted)} predictions cannot be judged by {len(measured)} measurements")
        relative = predicted / measured - 1
        return Accuracy(
            count=len(measured),
            rmse=float(np.sqrt(np.square(predicted - measured).mean())),
            mape=float(np.abs(relative).mean()),
            bias=float(relative.mean()),
            within_5_percent=float((np.abs(relative) <= 0.05).mean()),
            within_10_percent=float((np.abs(relative) <= 0.10).mean()),
            spearman=_correlation(spearmanr, predicted, measured),
            tau=_correlation(kendalltau, predicted, measured),
            tau_within_depth=None if depths is None else _tau_within(depths, predicted, measured),
        )


def _correlation(method, predicted: np.ndarray, measured: np.ndarray) -> float:
    if np.ptp(predicted) == 0 or np.ptp(measured) == 0:  # scipy would warn and give NaN
        return 0.0
    return float(method(predicted, measured).statistic)


def _tau_within(depths: np.ndarray, predicted: np.ndarray, measured: np.ndarray) -> float | None:
    groups = [depths == depth for depth in np.unique(depths)]
    groups = [group for group in groups if group.sum() >= 3]
    if not groups:
        return None
    taus = [_correlation(kendalltau, predicted[group], measured[group]) for group in groups]
    pairs = [group.sum() * (group.sum() - 1) / 2 for group in groups]
    return float(np.average(taus, weights=pairs))


@dataclass(frozen=True)
class Interval:
    """Prediction interval: a new measurement falls between two multiples of its prediction with ``confidence``.

    Split-conformal (Lei et al., JASA 2018): around the mean of the ``count`` log residuals, as wide as the quantile of
    their distances to it at rank ``confidence * (count + 1)`` (interpolated), enlarged because each residual is part of
    the mean. It assumes no distribution. In simulation with 20 to 100 residuals the 95 % interval covers 94.8 to 95.8 %
    of new ones, whether they are normal, biased, skew, Laplace, Student's t with 3 degrees of freedom or with 3 %
    outliers; Student's t interval covers 93.1 to 96.4 %. With fewer than 19 residuals (at 95 %) there is no such rank
    and Student's interval is used: 92.6 to 95.1 % with 12.
    """

    low: float
    high: float
    confidence: float
    count: int

    @staticmethod
    def of(log_residuals: np.ndarray, confidence: float = 0.95) -> Interval:
        """From log(measured / predicted) [n], n >= 2, of models that were held out of the fit."""
        count = len(log_residuals)
        if count < 2:
            raise ValueError(f"an interval needs at least 2 residuals, there are {count}")
        centre, rank = log_residuals.mean(), confidence * (count + 1)
        if rank > count:
            spread = log_residuals.std(ddof=1) * np.sqrt(1 + 1 / count)
            half = t.ppf((1 + confidence) / 2, count - 1) * spread
        else:
            distances = np.sort(np.abs(log_residuals - centre))
            half = np.interp(rank, np.arange(1, count + 1), distances) * np.sqrt((count + 1) / (count - 1))
        return Interval(float(np.exp(centre - half)), float(np.exp(centre + half)), confidence, count)

    def around(self, prediction: float) -> tuple[float, float]:
        """The ends of the interval for one prediction, in its unit."""
        return self.low * prediction, self.high * prediction


@dataclass(frozen=True, eq=False)
class Drift:
    """A machine's speed over time: the factor by which measurements exceed their expected values.

    A local level: at any time the mean of the log ratios around it, weighted by exp(-distance / ``width``), the
    steady-state optimum for a random walk observed with noise (Muth, JASA 1960). It is constant before the first and
    after the last time. The mean is one step of Tukey's biweight from the weighted median, so a single disturbed
    measurement does not bend it and a sudden step (a clock change) stays sharp. ``width`` has the unit of the times;
    infinity means no drift: one factor for all.
    """

    times: np.ndarray
    log_ratios: np.ndarray
    width: float
    scale: float

    @staticmethod
    def of(times: np.ndarray, log_ratios: np.ndarray) -> Drift:
        """From log(measured / expected) [n], n >= 1, at ``times`` [n].

        The width has the least leave-one-out absolute error among powers of two times the mean distance, up to the
        whole span. If that error is not below the error without drift by more than one standard error of the
        difference, no drift is assumed, so that noise is not taken for drift. Takes O(n**2 log n) time.
        """
        if not len(times):
            raise ValueError("drift needs at least one measurement")
        times, log_ratios = np.asarray(times, dtype=float), np.asarray(log_ratios, dtype=float)
        span = float(np.ptp(times))
        steady, steady_errors = _drift_of_width(times, log_ratios, np.inf)
        if span == 0 or len(times) < 4:
            return steady
        widths = span / (len(times) - 1) * 2.0 ** np.arange(1, int(np.log2(len(times))) + 1)
        drifting = [_drift_of_width(times, log_ratios, float(width)) for width in widths]
        best, errors = min(drifting, key=lambda candidate: candidate[1].mean())
        gain = steady_errors - errors
        return best if gain.mean() > gain.std() / len(gain) ** 0.5 else steady

    def factor(self, times: np.ndarray) -> np.ndarray:
        """Measured over expected [k] at ``times`` [k]."""
        at = np.asarray(times, dtype=float)
        return np.exp(_level(_closeness(at, self.times, self.width), self.log_ratios, self.scale))


def _drift_of_width(times: np.ndarray, log_ratios: np.ndarray, width: float) -> tuple[Drift, np.ndarray]:
    """A drift, and its leave-one-out absolute errors [n]."""
    alone = len(times) == 1
    kernel = _closeness(times, times, width, leave_out=not alone)
    scale = 1.4826 * float(np.median(np.abs(log_ratios - _median(kernel, log_ratios))))
    errors = np.abs(log_ratios - _level(kernel, log_ratios, scale))
    return Drift(times, log_ratios, width, scale), errors


def _closeness(at: np.ndarray, times: np.ndarray, width: float, leave_out: bool = False) -> np.ndarray:
    """Weights [k, n] of measurements at ``times`` for a level ``at`` a time; the closest has 1, so not all vanish.

    ``leave_out``: measurement i is excluded from level i.
    """
    distance = np.abs(at[:, None] - times)
    if leave_out:
        np.fill_diagonal(distance, distance.max())
    kernel = np.exp(-(distance - distance.min(axis=1, keepdims=True)) / width)
    if leave_out:
        np.fill_diagonal(kernel, 0.0)
    return kernel


def _median(kernel: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The median [k] of ``values`` [n] under each row of weights ``kernel`` [k, n]."""
    order = np.argsort(values)
    below = np.cumsum(kernel[:, order], axis=1)
    return values[order][(below >= below[:, -1:] / 2).argmax(axis=1)]


def _level(kernel: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """The robust mean [k] of ``values`` [n] under each row of ``kernel`` [k, n], for noise of ``scale``."""
    median = _median(kernel, values)
    # 4.685 standard deviations: 95 % of the efficiency of a mean where the noise is normal.
    distance = (values - median[:, None]) / max(4.685 * scale, 1e-12)
    robust = kernel * np.square(np.maximum(1 - np.square(distance), 0.0))
    return (robust * values).sum(axis=1) / robust.sum(axis=1)
