"""How well one judge of architectures agrees with another: rank correlation, regret, and how sure both are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

_RESAMPLES = 2000


@dataclass(frozen=True)
class Agreement:
    """Of ``count`` architectures: Kendall's tau-b and its bootstrap interval (95 %), Spearman's rho, and the regret.

    ``regret[k]`` is how much more the truly best of the judge's first k costs than the best of all, as a share of the
    latter: 0 when the best one is among them. Correlations are None where a judge gives everything the same mark.
    """

    count: int
    tau: float | None
    tau_low: float | None
    tau_high: float | None
    rho: float | None
    regret: dict[int, float]


def agreement(judged: np.ndarray, truth: np.ndarray, tops: tuple[int, ...] = (1, 3, 5), seed: int = 0) -> Agreement:
    """Agreement of the marks ``judged`` [n] with the losses ``truth`` [n]; lower is better in both."""
    tau, rho = kendall_tau(judged, truth), float(np.asarray(stats.spearmanr(judged, truth))[0])
    low, high = bootstrap(lambda index: kendall_tau(judged[index], truth[index]), len(truth), seed)
    order = np.argsort(judged, kind="stable")
    regret = {k: float(truth[order[:k]].min() / truth.min() - 1) for k in tops if k <= len(truth)}
    tau, low, high, rho = (None if math.isnan(value) else value for value in (tau, low, high, rho))
    return Agreement(len(truth), tau, low, high, rho, regret)


def kendall_tau(judged: np.ndarray, truth: np.ndarray) -> float:
    return float(np.asarray(stats.kendalltau(judged, truth))[0])


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of ``statistic`` of an index into ``count`` items drawn with replacement (Efron 1979);
    NaN twice where it is never defined."""
    rng = np.random.default_rng(seed)
    with np.errstate(invalid="ignore"):
        values = np.array([statistic(rng.integers(0, count, count)) for _ in range(_RESAMPLES)])
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of ``values`` [n]: infinite when n is 1, since one value has no variance."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return float(values.mean()) - half, float(values.mean()) + half
