"""Scores of the parts of layers: what each adds to the loss of a parent, from a log of trials."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from scipy.stats import kendalltau

from moesaic.nas.search.trials import Trial
from moesaic.search_spaces import Architecture, Attention, CrossAttention, FeedForward, Layer, Slot

Kind = Literal["attention", "cross", "feed_forward"]
Part = Attention | CrossAttention | FeedForward
Place = tuple[Slot, Kind]
"""A layer's address and one of its parts."""
Shape = tuple[tuple[int, int], ...]
"""Width and depth of each stack."""
KINDS: tuple[Kind, ...] = get_args(Kind)


def places_of(layers: Mapping[Slot, Layer]) -> list[Place]:
    """Of all parts of ``layers``: only some have cross-attention."""
    return [(slot, kind) for slot, layer in layers.items() for kind in KINDS if getattr(layer, kind) is not None]


def kind_of(part: Part) -> Kind:
    kinds: dict[type, Kind] = {Attention: "attention", CrossAttention: "cross", FeedForward: "feed_forward"}
    return kinds[type(part)]


def part_of(architecture: Architecture, place: Place) -> Part:
    return getattr(architecture.layers[place[0]], place[1])


def with_part(architecture: Architecture, place: Place, part: Part) -> Architecture:
    """``architecture`` with one part replaced."""
    slot, kind = place
    return architecture.with_layers({slot: replace(architecture.layers[slot], **{kind: part})})


def role_of(trial: Trial) -> str | None:
    """The purpose of a trial: ``parent``, ``part``, ``base`` (another width and depth), ``solution``."""
    return trial.engine.get("puzzle", {}).get("role")


@dataclass(frozen=True)
class Scores:
    """``bases``: the parent's loss in each shape. ``deltas``: the loss each part of a place adds (parent's: 0)."""

    parent: Architecture
    bases: Mapping[Shape, float]
    deltas: Mapping[Place, Mapping[Part, float]]

    @staticmethod
    def of(trials: Iterable[Trial]) -> Scores | None:
        """From a log, for trials of any budget; None where no parent was evaluated. Failed parts have no score."""
        judged = [(trial, trial.loss) for trial in trials if trial.state == "evaluated" and trial.loss is not None]
        found = next(((trial, loss) for trial, loss in judged if role_of(trial) == "parent"), None)
        if found is None:
            return None
        parent, loss = found[0].architecture, found[1]
        places = places_of(parent.layers)
        deltas: dict[Place, dict[Part, float]] = {place: {part_of(parent, place): 0.0} for place in places}
        for trial, changed in judged:
            if shape_of(trial.architecture) == shape_of(parent):
                differing = [place for place in places if part_of(trial.architecture, place) != part_of(parent, place)]
                if len(differing) == 1:
                    deltas[differing[0]][part_of(trial.architecture, differing[0])] = changed - loss
        bases, scores = {shape_of(parent): loss}, Scores(parent, {}, deltas)
        for trial, changed in judged:
            if role_of(trial) == "base" and (parts := scores.parts(trial.architecture)) is not None:
                bases.setdefault(shape_of(trial.architecture), changed - parts)
        return replace(scores, bases=bases)

    def uses(self, trial: Trial) -> bool:
        """Whether ``of`` looks at ``trial``, given the parent."""
        places = places_of(self.parent.layers)
        same_shape = shape_of(trial.architecture) == shape_of(self.parent)
        return role_of(trial) == "base" or (
            same_shape and sum(part_of(trial.architecture, p) != part_of(self.parent, p) for p in places) == 1
        )

    def parts(self, architecture: Architecture) -> float | None:
        """The sum of the scores of all parts; None where one has none."""
        total = 0.0
        for place in places_of(architecture.layers):
            delta = self.deltas.get(place, {}).get(part_of(architecture, place))
            if delta is None:
                return None
            total += delta
        return total

    def predict(self, architecture: Architecture) -> float | None:
        """The loss as a sum; None where a part, or the shape, has no score."""
        base, parts = self.bases.get(shape_of(architecture)), self.parts(architecture)
        return None if base is None or parts is None else base + parts


def shape_of(architecture: Architecture) -> Shape:
    return tuple((stack.width, len(stack.layers)) for stack in architecture.stacks.values())


def shaped(architecture: Architecture, shape: Shape) -> Architecture:
    """``architecture`` with other widths and the first layers of each stack."""
    stacks = {
        name: replace(stack, width=width, layers=stack.layers[:depth])
        for (name, stack), (width, depth) in zip(architecture.stacks.items(), shape, strict=True)
    }
    return replace(architecture, **stacks)


def additivity(trials: Iterable[Trial]) -> dict[str, float | None] | None:
    """How far predicted losses of solutions were from evaluated ones: their number, mean absolute error and mean
    error in nats, and Kendall's tau (None where undefined); None for a log with fewer than two solutions."""
    pairs = [
        (trial.engine["puzzle"]["predicted"], trial.loss)
        for trial in trials
        if trial.state == "evaluated" and role_of(trial) == "solution"
    ]
    if len(pairs) < 2:
        return None
    predicted, loss = np.array(pairs).T
    error, tau = predicted - loss, float(np.asarray(kendalltau(predicted, loss))[0])
    return {
        "solutions": len(pairs),
        "mean_absolute_error": float(np.abs(error).mean()),
        "mean_error": float(error.mean()),
        "tau": None if math.isnan(tau) else tau,
    }
