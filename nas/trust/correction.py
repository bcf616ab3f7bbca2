"""Corrects the bias of inherited losses: a regression of stand-alone losses on inherited ones and the coarse shape.

A slice's loss with shared weights has a bias that depends on its shape. Wide and deep slices are trained less than
they would be alone. Experts under top-1 routing may get too few tokens alone, but in a supernet other slices train
them too. A few stand-alone trainings measure this bias (`experiments/fidelity/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesaic.search_spaces import Architecture, Layer

FEWEST_TRAININGS = 8
"""Fewest trainings for a correction: with fewer it would fit noise."""
_STRENGTH = 0.1
"""Ridge penalty relative to the data: eight trainings are few for six columns."""


@dataclass(frozen=True)
class Judged:
    """An architecture with its inherited ``loss``, and its costs under the measured routing."""

    architecture: Architecture
    loss: float
    flops: float
    parameters: float


@dataclass(frozen=True)
class Correction:
    """Ridge regression (Hoerl and Kennard 1970) of the stand-alone ``losses`` [n] on ``features`` [n, columns]."""

    features: np.ndarray
    losses: np.ndarray

    @staticmethod
    def of(trained: Sequence[Judged], losses: np.ndarray) -> Correction:
        """From the stand-alone ``losses`` [n] of ``trained`` [n]."""
        return Correction(correction_features(trained), losses)

    def __call__(self, judged: Sequence[Judged]) -> np.ndarray:
        """[m] expected stand-alone losses of ``judged`` [m]."""
        return self.predict(correction_features(judged)) if judged else np.zeros(0)

    def predict(self, new: np.ndarray) -> np.ndarray:
        """[m] predictions for features [m, columns]. Columns are scaled to deviation 1; constant ones are ignored."""
        mean, scale = self.features.mean(0), self.features.std(0)
        scale = np.where(scale > 1e-12, scale, np.inf)
        x, new = (self.features - mean) / scale, (new - mean) / scale
        penalty = _STRENGTH * len(x) * np.eye(x.shape[1])
        return self.losses.mean() + new @ np.linalg.solve(x.T @ x + penalty, x.T @ (self.losses - self.losses.mean()))

    def left_out(self) -> np.ndarray:
        """[n] leave-one-out predictions: each training predicted from the others."""
        every = np.arange(len(self.losses))
        others = (Correction(self.features[every != i], self.losses[every != i]) for i in every)
        return np.array([other.predict(self.features[i : i + 1])[0] for i, other in enumerate(others)])


def correction_features(judged: Sequence[Judged]) -> np.ndarray:
    """[n, 4 + 2 * stacks] inherited loss, log FLOPs, log parameters, each stack's depth and log width, share of layers
    that route each token to one of several experts."""
    rows = []
    for one in judged:
        layers, stacks = one.architecture.layers.values(), one.architecture.stacks.values()
        shape = [value for stack in stacks for value in (len(stack.layers), np.log(stack.width))]
        top_1 = sum(map(_is_top_1, layers)) / len(layers)
        rows.append((one.loss, np.log(one.flops), np.log(one.parameters), *shape, top_1))
    return np.array(rows)


def _is_top_1(layer: Layer) -> bool:
    router = layer.feed_forward.router
    return router is not None and router.max_experts == 1
