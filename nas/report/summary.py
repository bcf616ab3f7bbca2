"""The result of a run in one value, as in ``summary.json``, and the sentences that introduce it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesaic.nas.context import Context
from moesaic.nas.costs.compliance import MeasuredLine, Refused, lines_over, over_text
from moesaic.nas.costs.latency.fitting import Accuracy
from moesaic.nas.costs.measure import LatencyFigures
from moesaic.nas.exports.figures import ExportFigures, RetrainedModel, SourceModel
from moesaic.nas.search.loop import SearchFigures
from moesaic.nas.tasks import Metric
from moesaic.nas.trust.findings import Trust
from moesaic.nas.trust.significance import LEVEL, holm
from moesaic.search_spaces.architecture import ArchitectureField

_COSTS = {"latency": "latency", "parameters": "parameters", "flops": "FLOPs"}
"""Costs that sentences compare, and their names there."""


@dataclass(frozen=True)
class Chosen:
    """The searched model, as exported in ``best``: ``retrained`` is what the verdict is about, and ``predicted``,
    ``measured`` and ``latency`` are its costs. ``inherited`` are the scores and costs of the same architecture with
    weights of the supernet, by which it was chosen from the ``refused`` ones."""

    fingerprint: str
    architecture: ArchitectureField
    picture: tuple[str, ...]
    inherited: ExportFigures
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
    """Everything a run found for one budget. ``metrics`` and the ``unit`` of losses are those of its task; the losses
    that the search went by are in ``judged_in``. ``budget`` are the lines of the exported ``best``, ``exports`` the
    names of all exports; the command ``more_seeds`` trains three seeds of every model. ``source`` is the trained model
    that the run starts from, if it does."""

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
    more_seeds: str
    unit: str = "nats per token"
    judged_in: str = "nats per token"
    source: SourceModel | None = None


def source_sentence(summary: Summary) -> str | None:
    """What the searched model costs and loses compared with the trained model that it comes from."""
    source, searched = summary.source, summary.chosen.retrained
    if source is None:
        return None
    shares = [
        f"{searched.measured[cost] / source.measured[cost]:.0%} of the {name}"
        for cost, name in _COSTS.items()
        if cost in searched.measured
    ]
    return (
        f"The searched model has {', '.join(shares[:-1])} and {shares[-1]}, compared with the trained model that it "
        f"comes from. Its test loss is {searched.loss:.4f}, that model's {source.loss:.4f}: "
        f"{searched.loss - source.loss:+.4f} {summary.unit}."
    )


def verdict(summary: Summary) -> str:
    """Did the search pay, by paired losses of models retrained with the same seeds, and what does its model cost?

    The difference to the best rival is significant where its p-value, Holm-corrected for the number of rivals, is below
    5 %. One training seed gives no verdict: two trainings of one model differ by more than an interval over sequences.
    Models that were not trained have no such variance.
    """
    searched, rivals = summary.chosen.retrained, summary.rivals
    if not rivals:
        return "No rival was trained, so it is unknown whether the search paid."
    best = min(rivals, key=lambda rival: rival.loss)
    above, many = best.above_searched, best.above_searched.seeds > 1
    figures = (
        f"{'mean ' if many else ''}test loss {searched.loss:.4f} against {best.loss:.4f} of the best rival "
        f"({best.name}), difference {above.mean:+.4f}"
    )
    interval = f"95 % interval of {above.low:+.4f} to {above.high:+.4f}"
    costs = costs_sentence(searched, best)
    trained = searched.steps > 0
    if trained and not many:
        return (
            f"One training seed gives no verdict: {figures}. Its {interval} is over test sequences alone; another "
            f"training seed often changes a difference by more than that. {costs} To train two more seeds of every "
            f"model: `{summary.more_seeds}`"
        )
    p_values = holm(np.array([rival.above_searched.p_value for rival in rivals]))
    p_value = float(p_values[rivals.index(best)])
    over = f"{above.seeds} training seeds and the test sequences" if trained else "the test sequences"
    chance = f"with a {interval} over {over}, in pairs; p = {p_value:.3f}"
    chance += f" (Holm-corrected for {len(rivals)} rivals)" if len(rivals) > 1 else ""
    if p_value >= LEVEL:
        return f"The search made no significant difference: {figures} {chance}. {costs}"
    return f"The search {'paid' if above.mean > 0 else 'did not pay'}: {figures} {chance}. {costs}"


def costs_sentence(searched: RetrainedModel, rival: RetrainedModel) -> str:
    """The searched model's measured costs as multiples of a rival's; latency where both were timed."""
    shares = [
        f"{searched.measured[cost] / rival.measured[cost]:.2f} times the {name}"
        for cost, name in _COSTS.items()
        if cost in searched.measured and cost in rival.measured
    ]
    return f"The searched model has {', '.join(shares[:-1])} and {shares[-1]} of that rival."


def over_sentence(summary: Summary) -> str | None:
    """The warning shown first when the chosen model is over its budget; None when it is not."""
    over = over_text(summary.budget)
    if over is None:
        return None
    none_inside = lines_over(summary.chosen.inherited.budget)
    return f"{over}. No candidate met the budget; this one exceeds it least." if none_inside else f"{over}."
