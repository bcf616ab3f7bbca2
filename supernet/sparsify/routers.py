"""Routers of a layer that was dense: a prediction of the activation mass of each expert.

Every prediction here is linear in what it predicts, at least in its last layer, so the prediction for an expert of
several tiles is the sum of theirs: one fit per layer serves every way to form experts.

Shapes: T tokens, N neurons, D width, G tiles, H hidden values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_RIDGE = 1e-2
"""Strength of the penalty, in mean squares of the inputs."""
_BOUND = 0.99
"""Quantile over tokens at which a tile's mass is cut: a few tokens of huge activations would rule the squared error."""
_HELD_OUT = 8
"""One token in so many, the last ones, judges the hidden layer."""
_STEPS, _CHECK, _PATIENCE = 600, 25, 6
"""Most training steps, the steps from one judgement to the next, and how many without an improvement end it."""
_BATCH, _RATE, _WARM = 256, 1e-2, 25


@dataclass(frozen=True)
class Neurons:
    """What a fit knows of a layer's neurons, in their new order.

    ``contribution`` [T, N] is what they add to the output, ``weight`` [N, D] and ``bias`` [N] are those of the value
    before the nonlinearity: of the gate, where there is one.
    """

    contribution: Tensor
    weight: Tensor
    bias: Tensor


def masses(contribution: Tensor, tile: int) -> Tensor:
    """[T, N / tile] the activation mass of each tile of neurons: the sum of what they contribute, [T, N]."""
    return contribution.unflatten(1, (-1, tile)).sum(2)


def bounded(mass: Tensor) -> Tensor:
    """``mass`` [T, G], each tile's at most its ``_BOUND`` quantile over the tokens."""
    return mass.minimum(mass.kthvalue(math.ceil(_BOUND * len(mass)), 0).values)


def fit_masses(inputs: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [G, D] and bias [G] that predict ``mass`` [T, G] from ``inputs`` [T, D] by ridge regression, in float64."""
    x, y = inputs.double(), mass.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x = x - mean_x
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean().clamp(min=1e-12))
    rows = torch.linalg.solve(gram, x.T @ (y - mean_y)).T
    return rows.float(), (mean_y - rows @ mean_x).float()


def _regression(inputs: Tensor, neurons: Neurons, tile: int) -> tuple[Tensor, Tensor]:
    return fit_masses(inputs, bounded(masses(neurons.contribution, tile)))


def _similarity(inputs: Tensor, neurons: Neurons, tile: int) -> tuple[Tensor, Tensor]:
    """MoEfication's similarity router (arXiv 2110.01786): a tile's row is the sum of its neurons' directions. Theirs is
    normed again; that sum would not be the row of a larger expert."""
    rows = F.normalize(neurons.weight, dim=1).unflatten(0, (-1, tile)).sum(1)
    return _scaled(inputs, rows, rows.new_zeros(len(rows)), masses(neurons.contribution, tile))


def _representative(inputs: Tensor, neurons: Neurons, tile: int) -> tuple[Tensor, Tensor]:
    """CMoE's router (arXiv 2502.04416), which needs no fit: a tile is as active as its representative neuron, the one
    nearest to the mean of what the tile's neurons contribute. Before the nonlinearity, so that it is linear: for a
    ReLU that is the same order, for a gated unit it leaves out the other factor."""
    each = neurons.contribution.unflatten(1, (-1, tile))  # [T, G, tile]
    own = (each - each.mean(2, keepdim=True)).square().sum(0).argmin(1)
    chosen = own + tile * torch.arange(len(own), device=own.device)
    return _scaled(inputs, neurons.weight[chosen], neurons.bias[chosen], masses(neurons.contribution, tile))


def _scaled(inputs: Tensor, rows: Tensor, bias: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The same order of the tiles, in units of mass: one slope and one offset for all tiles, by least squares."""
    score, mass = F.linear(inputs, rows, bias).double(), mass.double()
    centred = score - score.mean()
    slope = ((centred * mass).sum() / centred.square().sum().clamp(min=1e-12)).clamp(min=1e-6)
    return (slope * rows).float(), (slope * bias + mass.mean() - slope * score.mean()).float()


Fit = Callable[[Tensor, Neurons, int], tuple[Tensor, Tensor]]
FITS: dict[str, Fit] = {"regression": _regression, "similarity": _similarity, "representative": _representative}
"""By name, the rows [G, D] and bias [G] of a linear router, from inputs [T, D], neurons and the size of a tile."""


@torch.no_grad()
def fit_hidden(inputs: Tensor, missing: Tensor, hidden: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [H, D], bias [H] and output rows [G, H] of out silu(weight x + bias), which predicts ``missing`` [T, G]:
    what a linear prediction from ``inputs`` [T, D] leaves of the mass.

    Trained by AdamW on squared errors; the weights with the least error on the held-out tokens are kept. The output
    rows start at zero, and stay zero where no step reduced that error: the whole prediction is never worse there than
    the linear one. A function of its arguments alone.
    """
    generator = torch.Generator().manual_seed(seed)
    held = max(1, len(inputs) // _HELD_OUT)
    mean, scale = inputs.mean(0), inputs.std(0).square().mean().sqrt().clamp(min=1e-12)
    unit = missing.square().mean().sqrt().clamp(min=1e-12)
    x, y = (inputs - mean) / scale, missing / unit
    (x, judged), (y, target) = ((both[:-held], both[-held:]) for both in (x, y))
    start = torch.randn(hidden, x.shape[1], generator=generator) * x.shape[1] ** -0.5
    weights = [start.to(x.device), x.new_zeros(hidden), x.new_zeros(y.shape[1], hidden)]
    best, least, waited = [weight.clone() for weight in weights], target.square().mean().item(), 0
    optimiser = torch.optim.AdamW([weight.requires_grad_() for weight in weights], lr=_RATE)
    order = torch.empty(0, dtype=torch.long)
    for step in range(_STEPS):
        if len(order) == 0:
            order = torch.randperm(len(x), generator=generator)
        rows, order = order[:_BATCH].to(x.device), order[_BATCH:]
        optimiser.param_groups[0]["lr"] = _RATE * min(1, (step + 1) / _WARM) * (1 - step / _STEPS)
        optimiser.zero_grad()
        with torch.enable_grad():
            (_corrections(x[rows], weights) - y[rows]).square().mean().backward()
        optimiser.step()
        if (step + 1) % _CHECK == 0:
            error, waited = (_corrections(judged, weights) - target).square().mean().item(), waited + 1
            if error < least:
                best, least, waited = [weight.detach().clone() for weight in weights], error, 0
            elif waited == _PATIENCE:
                break
    weight, bias, out = best
    return weight / scale, bias - weight @ mean / scale, unit * out


def _corrections(x: Tensor, weights: list[Tensor]) -> Tensor:
    weight, bias, out = weights
    return F.linear(F.silu(F.linear(x, weight, bias)), out)
