"""Losses of trained models: for one seed, over several seeds, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from moesaic.nas.tasks import Task
from moesaic.nas.tasks.task import Split
from moesaic.nas.trust.ranking import mean_interval
from moesaic.supernet import Evaluation, Transformer


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A model on one split: ``loss`` in nats per token with its ``standard_error`` over sequences, and the metrics of
    its task by name. ``signature`` says how those of generated text were computed."""

    loss: float
    standard_error: float
    metrics: dict[str, float]
    tokens: int
    signature: str = ""

    @staticmethod
    def of(task: Task, split: Split, model: Transformer, evaluation: Evaluation) -> Scores:
        """Of ``model``, from its ``evaluation`` on held-out sequences of a split, and what it generates for these."""
        generated, signature = task.score_generation(model, split, len(evaluation.sequence_losses))
        return Scores(
            loss=evaluation.loss,
            standard_error=evaluation.standard_error,
            metrics=task.measure(split, evaluation.loss) | generated,
            tokens=evaluation.tokens,
            signature=signature,
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
            signature=runs[0].signature,
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
    """Mean of paired differences in loss, its standard error, 95 % interval and two-sided p-value.

    With several ``seeds`` they hold for other training seeds and other sequences. With one they hold for other
    sequences alone: the variance between training seeds is not known.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    p_value: float
    seeds: int = 1

    @staticmethod
    def of(differences: np.ndarray) -> Difference:
        """From ``differences`` [seeds, sequences].

        Seeds and sequences are crossed random factors: every seed's models are judged on the same sequences, whose
        choice therefore shifts all seeds alike and does not show in the variance between them. The variance of the
        mean is (MS_seeds + MS_sequences - MS_residual) / (seeds * sequences), without the last two where they would
        lower it; the degrees of freedom are Satterthwaite's (1946).
        """
        mean, squares = float(differences.mean()), _mean_squares(differences)
        total = sum(square for square, _ in squares)
        error = (total / differences.size) ** 0.5 if squares else math.inf
        freedom = total**2 / sum(square**2 / freedom for square, freedom in squares) if total else 1
        half = float(stats.t.ppf(0.975, freedom)) * error
        statistic = abs(mean) / error if error else math.inf if mean else 0.0
        p_value = 2 * float(stats.t.sf(statistic, freedom))
        return Difference(mean, error, mean - half, mean + half, p_value, len(differences))


def _mean_squares(differences: np.ndarray) -> list[tuple[float, int]]:
    """Mean squares of ``differences`` [seeds, sequences] that add up to the variance of their mean, times their number,
    each with its degrees of freedom; none for a single value."""
    seeds, sequences = differences.shape
    by_seed, by_sequence = differences.mean(1, keepdims=True), differences.mean(0, keepdims=True)
    of_seeds = [(sequences * float(by_seed.var(ddof=1)), seeds - 1)] if seeds > 1 else []
    of_sequences = [(seeds * float(by_sequence.var(ddof=1)), sequences - 1)] if sequences > 1 else []
    if not (of_seeds and of_sequences):
        return of_seeds or of_sequences
    freedom = (seeds - 1) * (sequences - 1)
    residual = float(((differences - by_seed - by_sequence + differences.mean()) ** 2).sum()) / freedom
    return of_seeds + ([*of_sequences, (-residual, freedom)] if of_sequences[0][0] > residual else [])


def paired_difference(evaluation: Evaluation, reference: Evaluation) -> Difference:
    """The difference in loss, sequence by sequence.

    What two models share (easy and hard text) cancels, so the error is far smaller than that of either loss.
    Training-seed variance is not included.
    """
    return difference_over_seeds([evaluation], [reference])


def difference_over_seeds(evaluations: Sequence[Evaluation], references: Sequence[Evaluation]) -> Difference:
    """The difference of two models trained with the same seeds and evaluated on the same sequences, in pairs."""
    mine, other = (np.array([one.sequence_losses for one in models]) for models in (evaluations, references))
    return Difference.of(mine - other)
