"""Judges of architectures, and how far each agrees with trained models: inherited loss, corrected, and costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from moesaic.nas.config import FEWEST_MEMBERS
from moesaic.nas.search.trials import Trial
from moesaic.nas.trust.correction import FEWEST_TRAININGS, Correction, Judged
from moesaic.nas.trust.ranking import agreement
from moesaic.nas.trust.sentences import CORRECTED, FLOPS, INHERITED, PARAMETERS

Row = Mapping[str, Any]


def judged_trial(trial: Trial) -> Judged:
    assert trial.loss is not None, "a feasible trial was evaluated"
    return Judged(trial.architecture, trial.loss, trial.costs["flops"], trial.costs["parameters"])


def correction_of(trials: Sequence[Trial], rows: Sequence[Row]) -> Correction | None:
    """What the members that finished training teach of inherited losses; None where they are too few."""
    by_number, finished = {trial.number: trial for trial in trials}, _finished(rows)
    if len(finished) < FEWEST_TRAININGS:
        return None
    return Correction.of(
        [judged_trial(by_number[row["trial"]]) for row in finished], _column(finished, "retrained_loss")
    )


def compare_judges(rows: Sequence[Row], correction: Correction | None = None) -> dict[str, dict[str, Any]] | None:
    """Agreement of inherited losses, of corrected ones (each member left out of its own correction), and of two judges
    that cost nothing, with the losses of the members that finished training; None where those are too few. ``null``
    stands for what is not defined."""
    finished = _finished(rows)
    if len(finished) < FEWEST_MEMBERS:
        return None
    judges = {INHERITED: _column(finished, "inherited_loss")}
    if correction is not None:
        judges[CORRECTED] = correction.left_out()
    judges[FLOPS], judges[PARAMETERS] = -_column(finished, "flops"), -_column(finished, "parameters")  # more is better
    truth = _column(finished, "retrained_loss")
    found = {name: asdict(agreement(marks, truth)) for name, marks in judges.items()}
    return {
        name: {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for name, row in found.items()
    }


def _finished(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["retrained_loss"] is not None]


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)
