"""Routers of a layer that was dense: a linear prediction of the activation mass of each expert.

A prediction by least squares is linear in what it predicts, so the prediction for an expert of several tiles is the sum
of theirs: one fit per layer serves every way to form experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-2
"""Strength of the penalty, in mean squares of the inputs."""


def masses(contribution: Tensor, tile: int) -> Tensor:
    """[T, N / tile] the activation mass of each tile of neurons: the sum of what they contribute, [T, N]."""
    return contribution.unflatten(1, (-1, tile)).sum(2)


def fit_masses(inputs: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [G, D] and bias [G] that predict ``mass`` [T, G] from ``inputs`` [T, D] by ridge regression, in float64."""
    x, y = inputs.double(), mass.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp(min=1e-12))
    rows = torch.linalg.solve(gram, x.T @ (y - mean_y)).T
    return rows.float(), (mean_y - rows @ mean_x).float()
