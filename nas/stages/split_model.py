"""What stage supernet does with a trained model: splits it into a model of which every member of the space is a slice,
and scores the choices of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesaic.nas.costs.use import Occupancy
from moesaic.nas.search.samplers.scores import Part, Place, Scores, kind_of, part_of, places_of, shape_of, with_part
from moesaic.nas.stages.directory import StageDirectory
from moesaic.nas.stages.run import Run
from moesaic.search_spaces import Architecture, Attention, FeedForward, Layer, Router, Slot
from moesaic.search_spaces.files import read_value, write_value
from moesaic.supernet import Transformer
from moesaic.supernet.sparsify.activity import LayerActivity
from moesaic.supernet.sparsify.replace import replacement_losses
from moesaic.supernet.sparsify.split import PartCost, split

SCORES, ACTIVITY = "parts.json", "activity.json"
_SCORED_TOKENS = 2048
"""Tokens on which networks that differ in one layer are compared."""
_TYPICAL = 2 / 3
"""Share of its heads, and of its neurons that a token uses, in a layer of the network in which errors are priced."""


@dataclass(frozen=True)
class PartScore:
    """The estimated ``loss`` in nats per token that ``part`` adds to the model, in proportion to its ``error``, the
    squared error of its output as a share of the output's square."""

    slot: Slot
    part: Attention | FeedForward
    error: float
    loss: float


@dataclass(frozen=True)
class PartScores:
    """Of every part that can be chosen; ``loss`` is that of the trained model."""

    loss: float
    parts: tuple[PartScore, ...]


def split_model(run: Run, directory: StageDirectory) -> tuple[Transformer, Occupancy]:
    """The split model and the loads of its experts; writes the scores of all parts and how sparse the layers are."""
    checkpoint, chosen = run.loaded.checkpoint, run.config.model
    assert checkpoint is not None and chosen is not None
    windows = run.task.batch(chosen.calibration_windows, run.config.seed, 0).tokens
    layers = run.space.depth
    with run.reporter.progress("supernet") as bar:

        def on_layer(done: int) -> None:
            bar.update(done, 2 * layers, "layers split")
            run.check_stop("supernet")

        source = checkpoint.load().to(run.device.torch_device)
        made = split(source, run.space, windows, chosen.cluster, chosen.router, on_layer)
        write_value(directory.path / ACTIVITY, made.activities, list[LayerActivity])

        def on_score(done: int) -> None:
            bar.update(layers + done, 2 * layers, "layers scored")
            run.check_stop("supernet")

        write_value(directory.path / SCORES, _scores(run, made.model, made.costs, on_score))
    return made.model, occupancy_of(made.costs)


def _scores(run: Run, model: Transformer, costs: list[PartCost], on_score: Callable[[int], None]) -> PartScores:
    """Every part of a network is compressed alike; then each in turn is whole again. What that gains, per unit of the
    part's error, is the price of error there, scaled so that the compressed network's own loss is predicted. What it
    costs to leave a part out is measured so too: that is not in proportion."""
    whole, choices = run.space.largest, dict[Place, list[PartCost]]()
    for cost in costs:
        choices.setdefault((cost.slot, kind_of(cost.part)), []).append(cost)
    typical = {place: _typical(found, part_of(whole, place)) for place, found in choices.items()}
    small = whole
    for place, cost in typical.items():
        small = with_part(small, place, cost.part)
    changes = {(place, part_of(whole, place)): _changed(small, place, part_of(whole, place)) for place in choices}
    changes |= {
        (place, cost.part): _changed(small, place, cost.part)
        for place, found in choices.items()
        for cost in found
        if not _size(cost.part)
    }
    batch = run.task.held_out("validation", max(1, _SCORED_TOKENS // run.task.sequence_length))
    replacements: dict[Slot, list[Layer]] = {}
    for ((slot, _), _), layer in changes.items():
        replacements.setdefault(slot, []).append(layer)
    compressed, found = replacement_losses(model, small, replacements, batch, run.task.loss, on_score)
    loss, _ = replacement_losses(model, whole, {}, batch, run.task.loss)
    added = {key: found[key[0][0]].pop(0) - compressed for key in changes}
    # More of a layer cannot hurt, and less cannot help: what seems to is noise.
    gains = {place: max(-added[place, part_of(whole, place)], 0.0) for place in choices}
    scale = max(compressed - loss, 0.0) / max(sum(gains.values()), 1e-12)

    def score(cost: PartCost) -> float:
        place = cost.slot, kind_of(cost.part)
        if not _size(cost.part):
            return scale * (gains[place] + max(added[place, cost.part], 0.0))
        return scale * gains[place] * cost.error / typical[place].error if typical[place].error else 0.0

    return PartScores(loss, tuple(PartScore(cost.slot, cost.part, cost.error, score(cost)) for cost in costs))


def _changed(architecture: Architecture, place: Place, part: Part) -> Layer:
    return with_part(architecture, place, part).layers[place[0]]


def _size(part: Part) -> int:
    """Heads, or neurons that a token may use; 0 for a part that is left out."""
    return part.worst_active_neurons if isinstance(part, FeedForward) else part.heads


def _typical(costs: list[PartCost], whole: Part) -> PartCost:
    """The part with the least error among those that are there and at most ``_TYPICAL`` of the ``whole`` one's size."""
    sizes = sorted({size for cost in costs if (size := _size(cost.part))})
    most = max(_TYPICAL * _size(whole), sizes[0])
    return min((cost for cost in costs if 0 < _size(cost.part) <= most), key=lambda cost: cost.error)


def occupancy_of(costs: list[PartCost]) -> Occupancy:
    """Pairs per token of each expert: under one router, the mean over the parts that have it."""
    seen: dict[tuple[Slot, int, Router], list[tuple[float, ...]]] = {}
    for cost in costs:
        if cost.load is not None and isinstance(cost.part, FeedForward) and cost.part.router is not None:
            seen.setdefault((cost.slot, cost.part.experts, cost.part.router), []).append(cost.load.pairs_per_token)
    return Occupancy({key: tuple(np.mean(loads, axis=0).tolist()) for key, loads in seen.items()})


def load_sparsity(run: Run) -> tuple[list[LayerActivity], PartScores]:
    """How sparse the layers of the trained model are, and the scores of what they may become."""
    folder = run.folder("supernet").path
    return read_value(folder / ACTIVITY, list[LayerActivity]), read_value(folder / SCORES, PartScores)


def load_scores(run: Run) -> Scores | None:
    """Scores for the search's programme, of every part that can be chosen. None where the run starts from random
    weights."""
    if run.loaded.checkpoint is None:
        return None
    found: PartScores = read_value(run.folder("supernet").path / SCORES, PartScores)
    parent = run.space.largest
    places = places_of(parent.layers)
    deltas: dict[Place, dict[Part, float]] = {place: {part_of(parent, place): 0.0} for place in places}
    for score in found.parts:
        deltas[score.slot, kind_of(score.part)][score.part] = score.loss
    return Scores(parent, {shape_of(parent): found.loss}, deltas)
