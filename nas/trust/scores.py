"""Losses of trained models: for one seed, over several seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesaic.nas.tasks import Task
from moesaic.nas.tasks.task import Split
from moesaic.nas.trust.ranking import mean_interval
from moesaic.supernet import Evaluation


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A model on one split: ``loss`` in nats per token with its ``standard_error`` over sequences, and the metrics of
    its task by name."""

    loss: float
    standard_error: float
    metrics: dict[str, float]
    tokens: int

    @staticmethod
    def of(task: Task, split: Split, evaluation: Evaluation) -> Scores:
        return Scores(
            loss=evaluation.loss,
            standard_error=evaluation.standard_error,
            metrics=task.measure(split, evaluation.loss),
            tokens=evaluation.tokens,
        )


@dataclass(frozen=True, kw_only=True)
class SeedRun(Scores):
    """One training. ``fingerprint`` is that of the model after any lowering of thresholds to fit the budget;
    ``seconds`` is the training time."""

    seed: int
    fingerprint: str
    thresholds_lowered: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MeanScores(Scores):
    """Means over the seeds of ``runs``. ``interval`` is the 95 % interval of the mean loss over seeds (Student), None
    for one seed; ``standard_error`` is still that over sequences."""

    interval: tuple[float, float] | None
    runs: tuple[SeedRun, ...]

    @staticmethod
    def over(runs: Sequence[SeedRun]) -> MeanScores:
        losses = np.array([run.loss for run in runs])
        return MeanScores(
            loss=float(losses.mean()),
            standard_error=float(np.mean([run.standard_error for run in runs])),
            metrics={name: float(np.mean([run.metrics[name] for run in runs])) for name in runs[0].metrics},
            tokens=runs[0].tokens,
            interval=mean_interval(losses) if len(runs) > 1 else None,
            runs=tuple(runs),
        )

    @property
    def half_interval(self) -> float | None:
        """Half the width of the 95 % interval of the mean loss; None for one seed."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    @property
    def error(self) -> float:
        """The figure after ``±``: half the interval over seeds, or the standard error with one seed."""
        return self.standard_error if self.half_interval is None else self.half_interval


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences in loss, its standard error and 95 % interval, over ``seeds`` seeds, or over sequences
    for one seed."""

    mean: float
    standard_error: float
    low: float
    high: float
    seeds: int = 1

    @staticmethod
    def of(differences: np.ndarray, seeds: int = 1) -> Difference:
        low, high = mean_interval(differences)
        error = float(differences.std(ddof=1) / len(differences) ** 0.5)
        return Difference(float(differences.mean()), error, low, high, seeds)


def paired_difference(evaluation: Evaluation, reference: Evaluation) -> Difference:
    """The difference in loss, sequence by sequence.

    What two models share (easy and hard text) cancels, so the error is far smaller than that of either loss.
    Training-seed variance is not included.
    """
    return Difference.of(np.array(evaluation.sequence_losses) - np.array(reference.sequence_losses))


def difference_over_seeds(evaluations: Sequence[Evaluation], references: Sequence[Evaluation]) -> Difference:
    """The difference of two models trained with the same seeds, seed by seed, so it includes training-seed variance;
    with one seed it is that over sequences."""
    pairs = list(zip(evaluations, references, strict=True))
    if len(pairs) == 1:
        return paired_difference(*pairs[0])
    return Difference.of(np.array([mine.loss - other.loss for mine, other in pairs]), len(pairs))
