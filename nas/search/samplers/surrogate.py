"""Predicts losses of new architectures with a Gaussian process, and the expected growth of the front.

Rasmussen and Williams 2006, chapter 2. The kernel is linear plus squared exponential: a loss is nearly a sum over
layers (integer programming over scores of parts relies on that too), and the rest is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

from moesaic.nas.costs.price import Costs, Pricer
from moesaic.search_spaces import Architecture, Layer, Slot

_COLUMNS, _CROSS_COLUMNS = 10, 3
"""Columns of a layer, and more of one with cross-attention."""
_LENGTH, _NOISE = 2.0, 0.01
"""Length scale per root of the number of columns, and noise variance, both for standardised values.
Chosen by marginal likelihood on the tables of experiments/search_bench."""

_BLAS = ThreadpoolController()
"""One thread: for small matrices a second one only busy-waits on a processor that a lane could use."""


def surrogate_features(
    pricer: Pricer, architecture: Architecture, costs: Costs, slots: Collection[Slot]
) -> list[float]:
    """[2 + 2 * stacks + 10 * slots + 3 * slots with cross-attention] columns: expected costs, each stack's shape, then
    each layer's columns, zeros at ``slots`` where there is none."""
    row = [math.log(costs["flops"]), math.log(costs["parameters"])]
    for stack in architecture.stacks.values():
        row += [math.log(stack.width), float(len(stack.layers))]
    uses = dict(zip(architecture.layers, pricer.expected_uses(architecture), strict=True))
    for slot in slots:
        if slot in uses:
            layer = architecture.layers[slot]
            row += _layer_features(layer, uses[slot].neurons + layer.feed_forward.shared_size)
        else:
            reads = architecture.stacks[slot.stack].layers[0].cross is not None
            row += [0.0] * (_COLUMNS + reads * _CROSS_COLUMNS)
    return row


def _layer_features(layer: Layer, active_neurons: float) -> list[float]:
    part, router, attention = layer.feed_forward, layer.feed_forward.router, layer.attention
    return [
        1.0,
        math.log(max(part.neurons, 1)),
        math.log(max(active_neurons, 1)),
        math.log(max(part.experts, 1)),
        math.log(max(part.expert_sizes, default=1) / min(part.expert_sizes, default=1)),
        float(part.shared_size),
        float(router is not None and router.max_experts == 1),
        (router.threshold or 0.0) if router else 0.0,
        float(attention.heads),
        float(attention.kv_heads),
        *([] if layer.cross is None else map(float, (layer.cross.heads, layer.cross.kv_heads, layer.cross.span))),
    ]


class GaussianProcess:
    """Fitted to ``values`` [n] at ``x`` [n, columns]. A column that does not vary is ignored."""

    @_BLAS.wrap(limits=1, user_api="blas")
    def __init__(self, x: np.ndarray, values: np.ndarray):
        scale = x.std(0)
        varies = scale > 1e-9
        self.centre, self.scale = x.mean(0), np.where(varies, scale, np.inf)
        self.columns = max(int(varies.sum()), 1)
        self.level, self.spread = values.mean(), values.std() or 1.0
        self.x = self._standardised(x)
        covariance = self._kernel(self.x, self.x)
        covariance[np.diag_indices(len(x))] += _NOISE
        self.root = cholesky(covariance, lower=True, check_finite=False)
        half = solve_triangular(self.root, (values - self.level) / self.spread, lower=True, check_finite=False)
        self.weights = solve_triangular(self.root, half, lower=True, trans=1, check_finite=False)

    @_BLAS.wrap(limits=1, user_api="blas")
    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[m] means and [m] standard deviations at ``x`` [m, columns]."""
        x = self._standardised(x)
        across = self._kernel(self.x, x)
        explained = solve_triangular(self.root, across, lower=True, check_finite=False)
        variance = 1 + (x * x).sum(1) / self.columns - (explained * explained).sum(0)
        return self.level + self.spread * (self.weights @ across), self.spread * np.sqrt(np.maximum(variance, 1e-12))

    def _standardised(self, x: np.ndarray) -> np.ndarray:
        return (x - self.centre) / self.scale

    def _kernel(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        products = a @ b.T
        distances = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * products
        return np.exp(distances / (-2 * _LENGTH**2 * self.columns)) + products / self.columns


def expected_gain(
    mean: np.ndarray, deviation: np.ndarray, costs: np.ndarray, front: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """[m] expected growth of the hypervolume, up to a factor, by candidates whose loss is normal and whose costs [m, k]
    are known.

    Hypervolume is the integral over cost limits of how far the lowest loss inside them is below a reference, so its
    growth is the integral of the expected improvement (Jones et al. 1998) under each limit. ``limits`` [n, k] sample
    it; ``front`` [f, 1 + k] has the loss first.
    """
    losses = front[:, 0]
    reference = losses.max() + 0.1 * np.ptp(losses)
    inside = (front[None, :, 1:] <= limits[:, None, :]).all(-1)
    level = np.where(inside, losses, reference).min(1)
    z = (level - mean[:, None]) / deviation[:, None]
    improvement = deviation[:, None] * (z * ndtr(z) + np.exp(-z * z / 2) / math.sqrt(2 * math.pi))
    return (improvement * (costs[:, None, :] <= limits).all(-1)).mean(1)
