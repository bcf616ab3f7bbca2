"""How well one judge of architectures agrees with another: rank correlation with its interval, and regret."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import root_scalar

_TAIL = 0.025
_STEEPEST = 50.0
"""Bound of the search for Mallows's parameter; at this value a ranking has no chance of another order."""


@dataclass(frozen=True)
class Agreement:
    """Over ``count`` architectures: Kendall's tau-b and its 95 % interval, Spearman's rho, and the regret.

    ``regret[k]`` is the relative excess in loss of the best of the judge's top k over the best of all: 0 if the best
    one is among them. Correlations are None where a judge gives all the same score.
    """

    count: int
    tau: float | None
    tau_low: float | None
    tau_high: float | None
    rho: float | None
    regret: dict[int, float]


def agreement(judged: np.ndarray, truth: np.ndarray, tops: tuple[int, ...] = (1, 3, 5)) -> Agreement:
    """Agreement of the scores ``judged`` [n] with the losses ``truth`` [n]; lower is better in both."""
    tau, rho = kendall_tau(judged, truth), float(np.asarray(stats.spearmanr(judged, truth))[0])
    low, high = tau_interval(tau, len(truth))
    order = np.argsort(judged, kind="stable")
    regret = {k: float(truth[order[:k]].min() / truth.min() - 1) for k in tops if k <= len(truth)}
    tau, low, high, rho = (None if math.isnan(value) else value for value in (tau, low, high, rho))
    return Agreement(len(truth), tau, low, high, rho, regret)


def kendall_tau(judged: np.ndarray, truth: np.ndarray) -> float:
    return float(np.asarray(stats.kendalltau(judged, truth))[0])


def tau_interval(tau: float, count: int) -> tuple[float, float]:
    """95 % interval of Kendall's ``tau`` over ``count`` members, by the exact distribution over permutations.

    In Mallows's model (1957) the probability of a ranking falls by one factor with every discordant pair. The interval
    holds the expected tau of all models under which neither as many discordant pairs or fewer, nor as many or more,
    have a chance below 2.5 % (as Clopper and Pearson's). A bootstrap would draw members in perfect order in perfect
    order again: [1, 1], though four members are in order by chance once in 24 times.
    """
    pairs = count * (count - 1) // 2
    if math.isnan(tau) or not pairs:
        return math.nan, math.nan
    discordant = (1 - tau) / 2 * pairs  # a tie counts half; rounded to the wider side
    most, fewest = math.ceil(round(discordant, 6)), math.floor(round(discordant, 6))

    def expected(steepness: float) -> float:
        return 1 - 2 * float(discordant_pairs(count, steepness) @ np.arange(pairs + 1)) / pairs

    def where_the_chance_ends(of: slice) -> float:
        def chance(steepness: float) -> float:
            return float(discordant_pairs(count, steepness)[of].sum()) - _TAIL

        return expected(root_scalar(chance, bracket=(-_STEEPEST, _STEEPEST)).root)

    low = -1.0 if most == pairs else where_the_chance_ends(slice(most + 1))
    high = 1.0 if fewest == 0 else where_the_chance_ends(slice(fewest, None))
    return low, high


def discordant_pairs(count: int, steepness: float) -> np.ndarray:
    """[pairs + 1] probabilities of the number of discordant pairs of two rankings of ``count`` members in Mallows's
    model, where each costs a factor exp(-``steepness``); 0 draws all permutations alike.

    The number is a sum of independent truncated geometric variables (Fligner and Verducci 1986).
    """
    total = np.ones(1)
    for places in range(2, count + 1):
        logs = -steepness * np.arange(places)
        weights = np.exp(logs - logs.max())
        total = np.convolve(total, weights / weights.sum())
    return total


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of ``values`` [n]: infinite when n is 1, since one value has no variance."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return float(values.mean()) - half, float(values.mean()) + half
