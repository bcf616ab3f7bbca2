"""Calibrates the latency predictor: chooses models, measures them until their times are precise, and fits.

Models are measured, not blocks: caches differ when a block is timed alone. A fit to models alone predicted new models
better than one to blocks and models (docs/latency.md). ``selection`` chooses the models.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch

from moesaic.nas.config import LatencyConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.latency.fitting import Accuracy, Interval, fit, leave_one_out
from moesaic.nas.costs.latency.predictor import LEVEL, TERMS, Anchor, LatencyPredictor, Measured, model_terms
from moesaic.nas.costs.latency.probe import random_passes
from moesaic.nas.costs.latency.selection import FEWEST_ROUNDS, flops_of, select, shallow
from moesaic.nas.costs.latency.timing import Figure, Series, Timer, drift_of, time_round
from moesaic.nas.device import Device
from moesaic.search_spaces import Architecture, SearchSpace

VERSION = 4
"""Part of a calibration's key: raise it when terms or the cost of kernels change."""
NOISY = 0.15
"""Spread of repeats, after drift correction, above which a calibration is not trusted."""
_PRECISE, _QUICK_SECONDS, _MOST = 0.012, 20.0, 10
"""More rounds are measured, up to this many times the configured number, until the median relative standard error of
a model's time is this small, as long as that takes only seconds."""
_ROUGH, _PATIENCE = 0.03, 3
"""Rounds continue, even when it takes longer, until the error is at most this."""
_SUSPICIOUS = 4.0
"""A model is measured again when its repeats spread by this many times the usual, or its residual exceeds this many
standard deviations."""
_ANCHOR_SEED = 20_090


@dataclass(frozen=True)
class Calibration:
    """A predictor and its measurements, one row per model."""

    predictor: LatencyPredictor
    rows: list[dict[str, float | str]]


def calibration_key(space: SearchSpace, context: Context, config: LatencyConfig, device: Device) -> str:
    """Everything a calibration depends on. The same key on the same machine gives the same predictor from the cache."""
    facts = [VERSION, TERMS, repr(replace(space, name="")), asdict(context), config.model_dump(), asdict(device)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def calibrate(
    space: SearchSpace,
    context: Context,
    config: LatencyConfig,
    device: Device,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure models of ``space`` and fit a predictor.

    Where time allows, these are ``config.models`` random members; a quarter is held out of the fit and estimates its
    error. Else they are shallow models, since terms add up over layers, and few whole ones, each of which is predicted
    by a fit to all the others. Weights and tokens are random: latency depends on the shape and the load, and both are
    known for every measurement.
    """
    rng, timer = Random(f"{seed}/latency"), Timer.of(device.kind)
    started = timer.clock()
    members = [space.sample_balanced(rng) for _ in range(config.models)]
    chosen = select(members, context, config, seconds_per_flop(members[0], context, device), rng)
    passes = random_passes(chosen.architectures, context, device, seed, chosen.vocab_sizes)
    near = chosen.near_anchors(context)
    anchors = random_passes(
        [chosen.architectures[i] for i in near], context, device, _ANCHOR_SEED, [chosen.vocab_sizes[i] for i in near]
    )
    terms = np.stack([model_terms(one.model.architecture, one.uses(), one.context) for one in passes])

    cases = [Series(one) for one in passes]
    survey = Survey(cases, [Series(one) for one in anchors], timer, rng)
    deadline = started + config.time_limit
    often = [case for case, whole in zip(cases, chosen.held_out, strict=True) if not (chosen.shallow and whole)]
    survey.time([case for case in cases if case not in often], 1)
    survey.measure(chosen.rounds, on_progress, often, deadline)
    doubtful = [case for case in survey.doubtful(terms) if case in often] if timer.clock() < deadline else []
    survey.time(doubtful, chosen.rounds)
    milliseconds, seconds = survey.milliseconds(), timer.clock() - started

    held_out = chosen.held_out
    if chosen.shallow:
        coefficients = fit(terms, milliseconds)
        judged = leave_one_out(terms, milliseconds, np.flatnonzero(held_out))
        residuals = np.log(milliseconds[held_out] / judged)
        intervals = [Interval.of(np.delete(residuals, i), LEVEL) for i in range(len(residuals))]
    else:
        fitted = ~held_out
        coefficients = fit(terms[fitted], milliseconds[fitted])
        judged = terms[held_out] @ coefficients
        residuals = np.log(milliseconds[fitted] / leave_one_out(terms[fitted], milliseconds[fitted]))
        intervals = [Interval.of(residuals, LEVEL)] * len(judged)
    ratios = (milliseconds[held_out] / judged).tolist()
    inside = [interval.low <= ratio <= interval.high for interval, ratio in zip(intervals, ratios, strict=True)]
    predicted = terms @ coefficients
    predicted[held_out] = judged
    depths = np.array([len(architecture.layers) for architecture in chosen.architectures])
    predictor = LatencyPredictor(
        tuple(map(float, coefficients)),
        tuple(map(float, residuals)),
        context,
        str(device),
        device.fingerprint,
        tuple(
            Anchor(chosen.architectures[i], chosen.vocab_sizes[i], milliseconds)
            for i, milliseconds in zip(near, survey.anchor_milliseconds().tolist(), strict=True)
        ),
        _ANCHOR_SEED,
        Accuracy.of(judged, milliseconds[held_out], depths[held_out]),
        float(np.mean(inside)),
        survey.summary(seconds, len(doubtful), clock_mhz(device), int((~held_out).sum()) if chosen.shallow else 0),
    )
    rows: list[dict[str, float | str]] = [
        {
            "kind": "held-out model" if held_out[i] else "model",
            "measured_ms": float(milliseconds[i]),
            "raw_ms": float(np.median(survey.cases[i].milliseconds)),
            "predicted_ms": float(predicted[i]),
            "layers": int(depths[i]),
            "vocabulary": chosen.vocab_sizes[i],
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
        for series in self.anchors:
            series.run()  # the first pass also pays for allocations; that of a case counted its load

    def measure(
        self,
        rounds: int,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        cases: Sequence[Series] | None = None,
        deadline: float = math.inf,
    ) -> None:
        """Time ``cases`` (default: all) ``rounds`` times, and more often until the figures are precise or time runs
        out. After ``deadline`` on the timer's clock, the fewest rounds that give a figure are enough."""
        cases, started, done, total = self.cases if cases is None else cases, self.timer.clock(), 0, rounds
        while done < total:
            self.time(cases, 1)
            done += 1
            now = self.timer.clock()
            if now > deadline and done >= FEWEST_ROUNDS:
                total = done
            elif done == total and self._goes_on(done / rounds, now - started):
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

    def summary(self, seconds: float, remeasured: int, clock: float | None, shallow: int = 0) -> Measured:
        drift = drift_of(self.anchors)
        factors = drift.factor(drift.times)
        return Measured(
            models=len(self.cases),
            shallow=shallow,
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


def seconds_per_flop(architecture: Architecture, context: Context, device: Device) -> float:
    """A rough speed of this machine, from a pass through one layer of ``architecture`` and a small vocabulary."""
    (small,), vocab_size = shallow([architecture], 1), min(context.vocab_size, 256)
    (one,) = random_passes([small], context, device, _ANCHOR_SEED, [vocab_size])
    one()
    return Timer.of(device.kind)(one)[1] / 1e3 / flops_of(small, one.context)
