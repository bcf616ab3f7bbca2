"""Timing on a machine whose speed drifts: everything is timed beside fixed reference models, the anchors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from scipy.stats import trim_mean

from moesaic.nas.costs.latency.fitting import Drift
from moesaic.search_spaces import StageFailed

ANCHOR_EVERY = 4
"""Measurements between two anchor timings: few share an anchor's noise, and anchors take a fifth of the time."""
_TURNS = 4
_PASSES = 3
_LEAST_MS = 6.0
"""Least duration of a measurement: a short pass is repeated more often."""
_MOST_PASSES = 12
_LONG_MS = 200.0
"""A measurement this long needs no further pass: disturbances average out, and caches matter little."""
_PAIRS = (12, 60)
"""Fewest and most measurements of a model beside the anchors."""
_PRECISION = 0.008
"""Relative standard error at which these measurements stop."""
_DOUBT = 3.0
"""Standard errors between a time and a limit that it is surely over."""
_LONG_SECONDS, _LONG_PAIRS = 60.0, 3
"""After so long, so many are enough."""


@dataclass(frozen=True)
class Timer:
    """Times calls. ``clock`` gives seconds; ``synchronise`` waits for the device."""

    clock: Callable[[], float] = time.perf_counter
    synchronise: Callable[[], object] = lambda: None

    @staticmethod
    def of(kind: str) -> Timer:
        """For a device of ``kind``, ``cpu`` or ``cuda``."""
        return Timer(synchronise=torch.cuda.synchronize) if kind == "cuda" else Timer()

    def __call__(self, run: Callable[[], object]) -> tuple[float, float]:
        """The time of measurement (seconds), and the milliseconds of the fastest of a few passes in a row: disturbances
        only add time, and the first pass finds caches filled by something else.

        Raises
        ------
        StageFailed : the clock did not move, or went backwards.
        """
        begin = self.clock()
        best, passes, now = float("inf"), 0, begin
        while passes < _MOST_PASSES and (now - begin) * 1e3 < (_LONG_MS if passes < _PASSES else _LEAST_MS):
            start = self.clock()
            run()
            self.synchronise()
            now = self.clock()
            best, passes = min(best, (now - start) * 1e3), passes + 1
        if not 0 < best < float("inf"):
            raise StageFailed("impossible duration measured", found=f"{best} ms", allowed="a clock that runs forward")
        return (begin + now) / 2, best


def passes_of(seconds: float) -> int:
    """Passes of about so many seconds that a measurement takes, if they are not short."""
    return min(_PASSES, math.ceil(_LONG_MS / 1e3 / seconds))


@dataclass
class Series:
    """One pass that is timed repeatedly."""

    run: Callable[[], object]
    moments: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    def time(self, timer: Timer) -> None:
        moment, milliseconds = timer(self.run)
        self.moments.append(moment)
        self.milliseconds.append(milliseconds)

    @property
    def spread(self) -> float:
        return relative_iqr(np.array(self.milliseconds))


def time_round(cases: Sequence[Series], anchors: Sequence[Series], timer: Timer, rng: Random) -> None:
    """Time each case once, in random order, with an anchor before, after and in between; the anchors take turns."""
    for index, case in enumerate(rng.sample(list(cases), len(cases))):
        if index % ANCHOR_EVERY == 0:
            _next(anchors).time(timer)
        case.time(timer)
    _next(anchors).time(timer)


def _next(anchors: Sequence[Series]) -> Series:
    return min(anchors, key=lambda anchor: len(anchor.moments))


def drift_of(anchors: Sequence[Series]) -> Drift:
    """The machine's speed over time, relative to its median.

    The time of each anchor and the machine's speed are estimated alternately: plain medians of anchors timed at
    different moments of a changing machine would not refer to one speed.
    """
    times = np.concatenate([anchor.moments for anchor in anchors])
    logs = [np.log(anchor.milliseconds) for anchor in anchors]
    levels = [np.median(own) for own in logs]
    ends = np.cumsum([len(own) for own in logs])[:-1]
    drift = Drift.of(times, np.concatenate([own - level for own, level in zip(logs, levels, strict=True)]))
    for _ in range(_TURNS):
        slowness = np.log(drift.factor(times))
        slowness -= np.median(slowness)
        levels = [np.median(own - slow) for own, slow in zip(logs, np.split(slowness, ends), strict=True)]
        drift = Drift.of(times, np.concatenate([own - level for own, level in zip(logs, levels, strict=True)]))
    return drift


@dataclass(frozen=True)
class Figure:
    """Milliseconds of one series at the machine's median speed; ``error`` is its relative standard error."""

    milliseconds: float
    error: float
    spread: float

    @staticmethod
    def of(series: Series, drift: Drift) -> Figure:
        corrected = np.array(series.milliseconds) / drift.factor(np.array(series.moments))
        logs = np.log(corrected)
        return Figure(_middle(logs), _error(logs), relative_iqr(corrected))


@dataclass(frozen=True)
class AnchoredTiming:
    """A pass timed beside anchors.

    ``raw_ms`` is the time it took; ``corrected_ms`` the time at the machine's speed during calibration:
    ``raw_ms`` over ``anchor_ratio``, the time of the anchors now over then. ``error`` is the relative standard error.
    """

    raw_ms: float
    corrected_ms: float
    anchor_ratio: float
    error: float


def time_with_anchors(
    run: Callable[[], object],
    anchors: Sequence[tuple[Callable[[], object], float]],
    timer: Timer,
    limit_ms: float = math.inf,
) -> AnchoredTiming:
    """Time ``run`` and the anchors (given with their milliseconds at calibration) alternately until the ratio is
    precise, the corrected time is beyond doubt over ``limit_ms``, or the most measurements are made. Each is compared
    with the anchors just before and just after."""
    for one in (run, *(anchor for anchor, _ in anchors)):
        timer(one)
    case, started = Series(run), timer.clock()
    slowness = [_slowness(anchors[0], timer)]
    while True:
        case.time(timer)
        slowness.append(_slowness(anchors[len(slowness) % len(anchors)], timer))
        around = (np.array(slowness[:-1]) + slowness[1:]) / 2
        ratios = np.log(case.milliseconds) - around
        error, count = _error(ratios), len(ratios)
        long = timer.clock() - started > _LONG_SECONDS
        over = math.log(_middle(ratios)) - math.log(limit_ms) > _DOUBT * error
        enough = count >= _PAIRS[0] and (error <= _PRECISION or over)
        if count >= _PAIRS[1] or enough or (long and count >= _LONG_PAIRS):
            break
    raw, corrected = _middle(np.log(case.milliseconds)), _middle(ratios)
    return AnchoredTiming(raw, corrected, raw / corrected, error)


def _slowness(anchor: tuple[Callable[[], object], float], timer: Timer) -> float:
    """log of the time of an anchor now over then."""
    run, calibrated = anchor
    return float(np.log(timer(run)[1] / calibrated))


def time_alone(run: Callable[[], object], timer: Timer, count: int = 15) -> float:
    """Milliseconds of ``run``: the lower quartile of repeated measurements, at the machine's current speed."""
    timer(run)
    return float(np.percentile([timer(run)[1] for _ in range(count)], 25))


def relative_iqr(milliseconds: np.ndarray) -> float:
    """Interquartile range over median."""
    quarter, median, three_quarters = np.percentile(milliseconds, [25, 50, 75])
    return float((three_quarters - quarter) / median)


def _middle(logs: np.ndarray) -> float:
    """exp of the mean of the middle half."""
    return float(np.exp(trim_mean(logs, 0.25)))


def _error(logs: np.ndarray) -> float:
    """Standard error of ``_middle``: 1.349 standard deviations are a normal sample's interquartile range, and the
    mean of its middle half has 1.09 times the error of the mean."""
    if len(logs) < 3:
        return float("inf")
    quarter, three_quarters = np.percentile(logs, [25, 75])
    return float(1.09 * (three_quarters - quarter) / 1.349 / len(logs) ** 0.5)
