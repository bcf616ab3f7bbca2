"""What stage supernet does with a trained model: splits it into a model of which every member of the space is a slice,
and scores the choices of every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moesaic.nas.costs.use import Occupancy
from moesaic.nas.search.samplers.scores import Part, Place, Scores, part_of, places_of, shape_of
from moesaic.nas.stages.directory import StageDirectory
from moesaic.nas.stages.run import Run
from moesaic.search_spaces import Architecture, FeedForward, Router, Slot
from moesaic.search_spaces.files import read_value, write_value
from moesaic.supernet import Transformer
from moesaic.supernet.sparsify.replace import replacement_losses
from moesaic.supernet.sparsify.split import PartCost, split

SCORES = "parts.json"
_SCORED_TOKENS = 2048
"""Tokens on which networks that differ in one layer are compared."""
_TYPICAL = 0.625
"""Share of its neurons that a token uses in a layer of the network in which errors are priced."""


@dataclass(frozen=True)
class PartScore:
    """The estimated ``loss`` in nats per token that ``part`` adds to the model, in proportion to its ``error``, the
    squared error of its output as a share of the output's square."""

    slot: Slot
    part: FeedForward
    error: float
    loss: float


@dataclass(frozen=True)
class PartScores:
    """Of every feed-forward part; ``loss`` is that of the trained model."""

    loss: float
    parts: tuple[PartScore, ...]


def split_model(run: Run, directory: StageDirectory) -> tuple[Transformer, Occupancy]:
    """The split model and the loads of its experts; writes the scores of all parts."""
    checkpoint, chosen = run.loaded.checkpoint, run.config.model
    assert checkpoint is not None and chosen is not None
    windows = run.task.batch(chosen.calibration_windows, run.config.seed, 0).tokens
    layers = run.space.depth
    with run.reporter.progress("supernet") as bar:

        def on_layer(done: int) -> None:
            bar.update(done, 2 * layers, "layers split")
            run.check_stop("supernet")

        source = checkpoint.load().to(run.device.torch_device)
        model, costs = split(source, run.space, windows, chosen.cluster, chosen.router, on_layer)

        def on_score(done: int) -> None:
            bar.update(layers + done, 2 * layers, "layers scored")
            run.check_stop("supernet")

        write_value(directory.path / SCORES, _scores(run, model, costs, on_score))
    return model, occupancy_of(costs)


def _scores(run: Run, model: Transformer, costs: list[PartCost], on_score: Callable[[int], None]) -> PartScores:
    """Every layer of a network is compressed alike; then each in turn is whole again. What that gains, per unit of the
    layer's error, is the price of error there, scaled so that the compressed network's own loss is predicted."""
    whole = run.space.largest
    typical = {slot: _typical([cost for cost in costs if cost.slot == slot], whole) for slot in whole.layers}
    parts = {slot: replace(whole.layers[slot], feed_forward=cost.part) for slot, cost in typical.items()}
    batch = run.task.held_out("validation", max(1, _SCORED_TOKENS // run.task.sequence_length))
    compressed, mended = replacement_losses(
        model, whole.with_layers(parts), whole.layers, batch, run.task.loss, on_score
    )
    loss, _ = replacement_losses(model, whole, {}, batch, run.task.loss)
    gains = {slot: max(compressed - mended[slot], 0.0) for slot in whole.layers}  # a loss from more of a layer is noise
    scale = max(compressed - loss, 0.0) / max(sum(gains.values()), 1e-12)
    prices = {slot: scale * gains[slot] / cost.error if cost.error else 0.0 for slot, cost in typical.items()}
    return PartScores(loss, tuple(PartScore(c.slot, c.part, c.error, c.error * prices[c.slot]) for c in costs))


def _typical(costs: list[PartCost], whole: Architecture) -> PartCost:
    """The part with the least error among those that use at most ``_TYPICAL`` of the whole layer's neurons."""
    most = _TYPICAL * whole.layers[costs[0].slot].feed_forward.worst_active_neurons
    small = [cost for cost in costs if cost.part.worst_active_neurons <= most]
    return min(small or costs, key=lambda cost: cost.error)


def occupancy_of(costs: list[PartCost]) -> Occupancy:
    """Pairs per token of each expert: under one router, the mean over the parts that have it."""
    seen: dict[tuple[Slot, int, Router], list[tuple[float, ...]]] = {}
    for cost in costs:
        if cost.load is not None and cost.part.router is not None:
            seen.setdefault((cost.slot, cost.part.experts, cost.part.router), []).append(cost.load.pairs_per_token)
    return Occupancy({key: tuple(np.mean(loads, axis=0).tolist()) for key, loads in seen.items()})


def load_scores(run: Run) -> Scores | None:
    """Scores for the search's programme: of every feed-forward part, and of the attention that the model has. None
    where the run starts from random weights."""
    if run.loaded.checkpoint is None:
        return None
    found: PartScores = read_value(run.folder("supernet").path / SCORES, PartScores)
    parent = run.space.largest
    places = places_of(parent.layers)
    deltas: dict[Place, dict[Part, float]] = {place: {part_of(parent, place): 0.0} for place in places}
    for score in found.parts:
        deltas[score.slot, "feed_forward"][score.part] = score.loss
    return Scores(parent, {shape_of(parent): found.loss}, deltas)
