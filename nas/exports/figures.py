"""Figures of exported and retrained models: the values in ``figures.json`` and ``results.json``."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.nas.context import Context
from moesaic.nas.costs.compliance import MeasuredLine, Refused
from moesaic.nas.costs.measure import LatencyFigures
from moesaic.nas.trust.scores import Difference, MeanScores, Scores
from moesaic.search_spaces.architecture import ArchitectureField

BEST, INHERITED_BEST = "best", "best-inherited"
"""Names of the chosen model's exports: retrained, which the verdict is about, and with weights of the supernet."""


@dataclass(frozen=True)
class RuntimeCheck:
    """How far the logits of another program are from ours on real text, in one pass and step by step with a cache."""

    program: str
    version: str
    positions: int
    logit_difference: float
    decode_logit_difference: float


@dataclass(frozen=True, kw_only=True)
class ExportFigures(Scores):
    """Scores are on the test split. ``predicted`` and ``measured`` are costs by name, in base units; ``refused`` are
    the candidates with a lower loss that were over the budget. The search ranked the model by ``validation_loss``. Of a
    model that was trained alone ``inherited`` are the scores with the supernet's weights. The last two say how far
    logits are from those of the supernet's slice (None: other weights), and from those of the model read back from disk
    (None: not read back yet)."""

    name: str
    trial: int
    fingerprint: str
    weights: str
    validation_loss: float | None
    predicted: dict[str, float]
    measured: dict[str, float]
    latency: LatencyFigures | None
    budget: tuple[MeasuredLine, ...]
    refused: tuple[Refused, ...]
    device: str
    context: Context
    inherited: Scores | None = None
    slice_max_logit_difference: float | None = None
    reload_max_logit_difference: float | None = None
    checks: tuple[RuntimeCheck, ...] = ()
    """Of the programs that it was converted for."""


@dataclass(frozen=True, kw_only=True)
class SourceModel(Scores):
    """The trained model that a run starts from, on the test split, measured like the models that come from it."""

    architecture: ArchitectureField
    measured: dict[str, float]
    latency: LatencyFigures | None


STARTS = {
    "scratch": "scratch",
    "inherited": "inherited weights",
    "repaired": "the trained model's weights, repaired",
}
"""By ``retrain.init``, what a model starts from."""


def training_text(init: str, steps: int) -> str:
    """What happened to a model: ``400 steps from scratch``."""
    return f"{steps} steps from {STARTS[init]}" if steps else f"{STARTS[init]}, not trained"


def weights_text(init: str, steps: int, seed: int) -> str:
    """The same for a model of one seed: ``trained from scratch for 400 steps with seed 0``."""
    if steps:
        return f"trained from {STARTS[init]} for {steps} steps with seed {seed}"
    return training_text(init, steps)


@dataclass(frozen=True, kw_only=True)
class RetrainedModel(MeanScores):
    """The searched model or a rival, trained alike and evaluated on the test split, with the thresholds that the first
    seed's model needs to fit the budget. ``measured`` costs are those of that model; budget lines for costs that depend
    on routing are those of the most expensive seed. ``seconds`` is the total over all trainings."""

    name: str
    fingerprint: str
    architecture: ArchitectureField
    thresholds_lowered: bool
    inherited_loss: float | None
    above_searched: Difference
    predicted: dict[str, float]
    measured: dict[str, float]
    latency: LatencyFigures | None
    budget: tuple[MeasuredLine, ...]
    steps: int
    init: str
    seconds: float
