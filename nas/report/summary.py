"""The result of a run in one value, as in ``summary.json``, and the sentences that introduce it."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.nas.context import Context
from moesaic.nas.costs.compliance import MeasuredLine, Refused, over_text
from moesaic.nas.costs.latency.fitting import Accuracy
from moesaic.nas.costs.measure import LatencyFigures
from moesaic.nas.exports.figures import RetrainedModel
from moesaic.nas.search.loop import SearchFigures
from moesaic.nas.tasks import Metric
from moesaic.nas.trust.findings import Trust
from moesaic.nas.trust.scores import Scores
from moesaic.search_spaces.architecture import ArchitectureField


@dataclass(frozen=True)
class Chosen:
    """The searched model. ``inherited`` are its scores before training, ``predicted`` and ``measured`` its costs."""

    fingerprint: str
    architecture: ArchitectureField
    picture: tuple[str, ...]
    inherited: Scores
    predicted: dict[str, float]
    measured: dict[str, float]
    refused: tuple[Refused, ...]
    latency: LatencyFigures | None
    retrained: RetrainedModel


@dataclass(frozen=True)
class PredictorFigures:
    """The accuracy of the latency predictor, in figures and in words."""

    accuracy: Accuracy
    text: str


@dataclass(frozen=True)
class Summary:
    """Everything a run found for one budget. ``metrics`` are those of its task, ``exports`` the names of all
    exports."""

    name: str
    date: str
    seed: int
    device: str
    versions: dict[str, str]
    metrics: tuple[Metric, ...]
    budget: tuple[MeasuredLine, ...]
    chosen: Chosen
    rivals: tuple[RetrainedModel, ...]
    search: SearchFigures
    supernet: dict[str, float]
    latency_predictor: PredictorFigures | None
    trust: Trust
    exports: tuple[str, ...]
    stage_seconds: dict[str, float]
    context: Context


def verdict(summary: Summary) -> str:
    """One sentence: did the search pay, by paired losses of models retrained with the same seeds?

    The difference is significant exactly where its 95 % interval excludes 0.
    """
    searched, rivals = summary.chosen.retrained, summary.rivals
    if not rivals:
        return "No rival was trained, so it is unknown whether the search paid."
    best = min(rivals, key=lambda rival: rival.loss)
    above = best.above_searched
    many = above.seeds > 1
    figures = (
        f"{'mean ' if many else ''}test loss {searched.loss:.4f} against {best.loss:.4f} of the best rival "
        f"({best.name}), difference {above.mean:+.4f} with a 95 % interval of {above.low:+.4f} to {above.high:+.4f} "
        "over " + (f"{above.seeds} training seeds, in pairs" if many else "sequences, in pairs, one training seed each")
    )
    if above.low <= 0 <= above.high:
        return f"The search made no significant difference: {figures}."
    return f"The search {'paid' if above.low > 0 else 'did not pay'}: {figures}."


def over_sentence(summary: Summary) -> str | None:
    """The warning shown first when the chosen model is over its budget; None when it is not."""
    over = over_text(summary.budget)
    return over and f"{over}. No candidate met the budget; this one exceeds it least."
