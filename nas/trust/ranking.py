"""How well one judge of architectures agrees with another: rank correlation, regret, and confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

_RESAMPLES = 2000


@dataclass(frozen=True)
class Agreement:
    """Over ``count`` architectures: Kendall's tau-b and its bootstrap interval (95 %), Spearman's rho, and the regret.

    ``regret[k]`` is the relative excess in loss of the best of the judge's top k over the best of all: 0 if the best
    one is among them. Correlations are None where a judge gives all the same score.
    """

    count: int
    tau: float | None
    tau_low: float | None
    tau_high: float | None
    rho: float | None
    regret: dict[int, float]


def agreement(judged: np.ndarray, truth: np.ndarray, tops: tuple[int, ...] = (1, 3, 5), seed: int = 0) -> Agreement:
    """Agreement of the scores ``judged`` [n] with the losses ``truth`` [n]; lower is better in both."""
    tau, rho = kendall_tau(judged, truth), float(np.asarray(stats.spearmanr(judged, truth))[0])
    low, high = bootstrap(lambda index: kendall_tau(judged[index], truth[index]), len(truth), seed)
    order = np.argsort(judged, kind="stable")
    regret = {k: float(truth[order[:k]].min() / truth.min() - 1) for k in tops if k <= len(truth)}
    tau, low, high, rho = (None if math.isnan(value) else value for value in (tau, low, high, rho))
    return Agreement(len(truth), tau, low, high, rho, regret)


def kendall_tau(judged: np.ndarray, truth: np.ndarray) -> float:
    return float(np.asarray(stats.kendalltau(judged, truth))[0])


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of ``statistic``, a function of the drawn indices into ``count``
    items; two NaNs where it is never defined."""
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
