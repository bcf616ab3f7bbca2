"""Calibrates the latency predictor: chooses models, measures them until their times are precise, and fits.

Whole models are measured, not blocks: caches differ when a block is timed alone. A fit to models alone predicted new
models better than one to blocks and models (docs/latency.md).
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch

from moesaic.nas.config import LatencyConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.latency.fitting import Accuracy, Interval, fit, leave_one_out
from moesaic.nas.costs.latency.predictor import LEVEL, TERMS, Anchor, LatencyPredictor, Measured, model_terms
from moesaic.nas.costs.latency.probe import random_passes
from moesaic.nas.costs.latency.timing import Figure, Series, Timer, drift_of, time_round
from moesaic.nas.costs.price import Pricer
from moesaic.nas.device import Device
from moesaic.search_spaces import Architecture, SearchSpace

VERSION = 3
"""Part of a calibration's key: raise it when terms or the cost of kernels change."""
NOISY = 0.15
"""Spread of repeats, after drift correction, above which a calibration is not trusted."""
_PRECISE, _QUICK_SECONDS, _MOST = 0.012, 20.0, 10
"""More rounds are measured, up to this many times the configured number, until the median relative standard error of
a model's time is this small, as long as that takes only seconds."""
_ROUGH, _PATIENCE = 0.03, 3
"""Rounds continue, even when it takes longer, until the error is at most this."""
_HELD_OUT = 4
"""One model in this many is held out of the fit."""
_SUSPICIOUS = 4.0
"""A model is measured again when its repeats spread by this many times the usual, or its residual exceeds this many
standard deviations."""
_ANCHORS = 5
"""Several anchors represent the models better than one: a slower machine does not slow all models alike."""
_ANCHOR_SEED = 20_090


@dataclass(frozen=True)
class Calibration:
    """A predictor and its measurements, one row per model."""

    predictor: LatencyPredictor
    rows: list[dict[str, float | str]]


def calibration_key(space: SearchSpace, context: Context, config: LatencyConfig, device: Device) -> str:
    """Everything a calibration depends on. The same key on the same machine gives the same predictor from the cache."""
    facts = [VERSION, TERMS, space.envelope.to_dict(), asdict(context), config.model_dump(), asdict(device)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def calibrate(
    space: SearchSpace,
    context: Context,
    config: LatencyConfig,
    device: Device,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure ``config.models`` random models of ``space`` and fit a predictor to three quarters of them.

    The rest estimates its error. Weights and tokens are random: latency depends on the shape and the load, and both are
    known for every measurement.
    """
    rng = Random(f"{seed}/latency")
    architectures = [space.sample_balanced(rng) for _ in range(config.models)]
    passes = random_passes(architectures, context, device, seed)
    chosen = spread_by_flops(architectures, context, _ANCHORS)
    anchors = random_passes(chosen, context, device, _ANCHOR_SEED)
    terms = np.stack([model_terms(a, one.uses(), context) for a, one in zip(architectures, passes, strict=True)])
    fitted = np.arange(len(passes)) % _HELD_OUT < _HELD_OUT - 1

    timer = Timer.of(device.kind)
    started = timer.clock()
    survey = Survey([Series(one) for one in passes], [Series(one) for one in anchors], timer, rng)
    survey.measure(config.repeats, on_progress)
    doubtful = survey.doubtful(terms)
    survey.time(doubtful, config.repeats)
    milliseconds, seconds = survey.milliseconds(), timer.clock() - started

    coefficients = fit(terms[fitted], milliseconds[fitted])
    residuals = np.log(milliseconds[fitted] / leave_one_out(terms[fitted], milliseconds[fitted]))
    predicted = terms @ coefficients
    interval, held_out = Interval.of(residuals, LEVEL), milliseconds[~fitted] / predicted[~fitted]
    depths = np.array([len(architecture.layers) for architecture in architectures])
    predictor = LatencyPredictor(
        tuple(map(float, coefficients)),
        tuple(map(float, residuals)),
        context,
        str(device),
        device.fingerprint,
        tuple(
            Anchor(architecture, milliseconds)
            for architecture, milliseconds in zip(chosen, survey.anchor_milliseconds().tolist(), strict=True)
        ),
        _ANCHOR_SEED,
        Accuracy.of(predicted[~fitted], milliseconds[~fitted], depths[~fitted]),
        float(((interval.low <= held_out) & (held_out <= interval.high)).mean()),
        survey.summary(seconds, len(doubtful), clock_mhz(device)),
    )
    rows: list[dict[str, float | str]] = [
        {
            "kind": "model" if fitted[i] else "held-out model",
            "measured_ms": float(milliseconds[i]),
            "raw_ms": float(np.median(survey.cases[i].milliseconds)),
            "predicted_ms": float(predicted[i]),
            "layers": int(depths[i]),
            "measurements": len(survey.cases[i].milliseconds),
            **dict(zip(TERMS, terms[i].tolist(), strict=True)),
        }
        for i in range(len(passes))
    ]
    return Calibration(predictor, rows)


class Survey:
    """Models timed beside anchors, and their times after drift correction."""

    def __init__(self, cases: Sequence[Series], anchors: Sequence[Series], timer: Timer, rng: Random):
        self.cases, self.anchors, self.timer, self.rng = list(cases), list(anchors), timer, rng
        for series in (*self.anchors, *self.cases):
            series.run()  # the first pass also pays for allocations

    def measure(self, rounds: int, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Time every case ``rounds`` times, and more often until the figures are precise or time runs out."""
        started, done, total = self.timer.clock(), 0, rounds
        while done < total:
            self.time(self.cases, 1)
            done += 1
            if done == total and self._goes_on(done / rounds, self.timer.clock() - started):
                total += 1
            on_progress(done, total)

    def _goes_on(self, times: float, seconds: float) -> bool:
        error = float(np.median([figure.error for figure in self.figures()]))
        quick = error > _PRECISE and times < _MOST and seconds < _QUICK_SECONDS
        return quick or (error > _ROUGH and times < _PATIENCE)

    def time(self, cases: Sequence[Series], rounds: int) -> None:
        for _ in range(rounds if cases else 0):
            time_round(cases, self.anchors, self.timer, self.rng)

    def figures(self) -> list[Figure]:
        drift = drift_of(self.anchors)
        return [Figure.of(case, drift) for case in self.cases]

    def milliseconds(self) -> np.ndarray:
        """[n]: each case at the machine's median speed."""
        return np.array([figure.milliseconds for figure in self.figures()])

    def anchor_milliseconds(self) -> np.ndarray:
        """[k]: each anchor at the machine's median speed."""
        drift = drift_of(self.anchors)
        return np.array([Figure.of(anchor, drift).milliseconds for anchor in self.anchors])

    def doubtful(self, terms: np.ndarray) -> list[Series]:
        """Cases whose repeats spread far more than usual, or that are far from what the others predict."""
        figures = self.figures()
        errors = np.array([figure.error for figure in figures])
        milliseconds = np.array([figure.milliseconds for figure in figures])
        residuals = np.log(milliseconds / leave_one_out(terms, milliseconds))
        scale = 1.4826 * np.median(np.abs(residuals - np.median(residuals)))
        far = np.abs(residuals - np.median(residuals)) > _SUSPICIOUS * scale
        doubt = far | (errors > _SUSPICIOUS * np.median(errors))
        return [case for case, doubted in zip(self.cases, doubt, strict=True) if doubted]

    def summary(self, seconds: float, remeasured: int, clock: float | None) -> Measured:
        drift = drift_of(self.anchors)
        factors = drift.factor(drift.times)
        return Measured(
            models=len(self.cases),
            measurements=sum(len(series.moments) for series in (*self.anchors, *self.cases)),
            seconds=seconds,
            noise=float(np.median([figure.spread for figure in self.figures()])),
            raw_noise=float(np.median([case.spread for case in self.cases])),
            slowest=float(np.percentile(factors, 95)),
            fastest=float(np.percentile(factors, 5)),
            drift_seconds=drift.width if np.isfinite(drift.width) else None,
            remeasured=remeasured,
            date=datetime.date.today().isoformat(),
            clock_mhz=clock,
        )


def spread_by_flops(architectures: Sequence[Architecture], context: Context, count: int) -> list[Architecture]:
    """``count`` of the models, evenly spread by FLOPs, without the extremes."""
    pricer = Pricer(context)
    ranked = sorted(architectures, key=lambda a: (pricer.expected(a)["flops"], a.fingerprint))
    return [ranked[int((index + 0.5) * len(ranked) / count)] for index in range(count)]


def clock_mhz(device: Device) -> float | None:
    """Mean clock of the processors or of the GPU at this moment, where it can be read."""
    if device.kind == "cuda":
        try:
            return float(torch.cuda.clock_rate())
        except (ModuleNotFoundError, RuntimeError):
            return None
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None
