"""A latency predictor: a sum over blocks of physically meant terms with non-negative coefficients.

The terms count work (multiply-accumulates, bytes of weights, elements moved, launches); the coefficients are the
seconds each costs on one device, fitted to measurements of blocks and whole models there by least squares on the
relative error. Non-negativity is what keeps it sane beyond the measured points (a ridge on the same terms diverges).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.stats import kendalltau

from nas.costs.analytic import Context
from nas.costs.use import LayerUse
from search_spaces import Architecture, Backbone, Layer, MoesaicError
from search_spaces.files import read_json, write_json

TERMS = (
    "head_launch",
    "head_macs",
    "attention_launch",
    "attention_macs",
    "attention_scores",
    "attention_elements",
    "attention_width",
    "dense_launch",
    "dense_macs",
    "dense_elements",
    "dense_width",
    "sparse_launch",
    "routing",
    "experts",
    "pair_elements",
    "expert_macs",
    "expert_weights",
    "expert_elements",
    "sparse_width",
)
_INDEX = {name: i for i, name in enumerate(TERMS)}
Terms = list[float]


def head_terms(width: int, context: Context) -> Terms:
    """Embedding, last norm and vocabulary layer."""
    return _vector(head_launch=1, head_macs=context.tokens * width * context.vocab_size)


def attention_terms(width: int, layer: Layer, backbone: Backbone, context: Context) -> Terms:
    """Norm, attention and residual of one layer."""
    heads, kv_heads = layer.attention.heads * backbone.head_size, layer.attention.kv_heads * backbone.head_size
    tokens = context.tokens
    return _vector(
        attention_launch=1,
        attention_macs=2 * tokens * width * (heads + kv_heads),
        attention_scores=tokens * context.sequence_length * heads,
        attention_elements=tokens * (heads + kv_heads),
        attention_width=tokens * width,
    )


def feed_forward_terms(width: int, layer: Layer, use: LayerUse, backbone: Backbone, context: Context) -> Terms:
    """Norm, feed-forward part and residual of one layer."""
    part, tokens, matrices = layer.feed_forward, context.tokens, backbone.matrices
    if part.router is None:
        return _vector(
            dense_launch=1,
            dense_macs=tokens * width * matrices * part.neurons,
            dense_elements=tokens * part.neurons,
            dense_width=tokens * width,
        )
    return _vector(
        dense_macs=tokens * width * matrices * part.shared_size,
        dense_elements=tokens * part.shared_size,
        sparse_launch=1,
        routing=tokens * part.experts,
        experts=use.live_experts,
        pair_elements=tokens * use.pairs * width,
        expert_macs=tokens * use.neurons * width * matrices,
        expert_weights=use.live_neurons * width * matrices,
        expert_elements=tokens * use.neurons,
        sparse_width=tokens * width,
    )


def model_terms(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> np.ndarray:
    """Terms of a whole model: the sum over its blocks."""
    width, backbone = architecture.decoder.width, architecture.backbone
    total = np.array(head_terms(width, context))
    for layer, use in zip(architecture.decoder.layers, uses, strict=True):
        total += attention_terms(width, layer, backbone, context)
        total += feed_forward_terms(width, layer, use, backbone, context)
    return total


def _vector(**values: float) -> Terms:
    terms = [0.0] * len(TERMS)
    for name, value in values.items():
        terms[_INDEX[name]] = value
    return terms


@dataclass(frozen=True)
class Accuracy:
    """Errors of predictions on whole models that were not fitted: shares are of 1, tau is Kendall's."""

    models: int
    mape: float
    bias: float
    within_10_percent: float
    tau: float

    @staticmethod
    def of(predicted: np.ndarray, measured: np.ndarray) -> Accuracy:
        relative = predicted / measured - 1
        tau: float = np.asarray(kendalltau(predicted, measured))[0]
        return Accuracy(
            len(measured),
            float(np.abs(relative).mean()),
            float(relative.mean()),
            float((np.abs(relative) <= 0.10).mean()),
            float(tau) if np.isfinite(tau) else 0.0,  # undefined where all predictions tie: they rank nothing
        )


@dataclass(frozen=True)
class LatencyPredictor:
    """Coefficients in milliseconds per unit of each term, for one device and context."""

    coefficients: tuple[float, ...]
    context: Context
    device: str
    device_fingerprint: str
    accuracy: Accuracy
    noise: float
    measured_on: str
    key: str
    _array: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_array", np.array(self.coefficients))

    def predict(self, architecture: Architecture, uses: Sequence[LayerUse]) -> float:
        """Milliseconds of one forward pass over the context's batch."""
        return float(model_terms(architecture, uses, self.context) @ self._array)

    def save(self, path: Path) -> None:
        data = asdict(self)
        del data["_array"]
        data["coefficients"] = dict(zip(TERMS, self.coefficients, strict=True))
        write_json(path, data)

    @staticmethod
    def load(path: Path, device_fingerprint: str, device: str) -> LatencyPredictor:
        """Read a predictor. Raises MoesaicError for a damaged file or one calibrated on another device."""
        data: dict[str, Any] = read_json(path)
        try:
            data["coefficients"] = tuple(data["coefficients"][name] for name in TERMS)
            data["context"] = Context(**data["context"])
            data["accuracy"] = Accuracy(**data["accuracy"])
            predictor = LatencyPredictor(**data)
        except (KeyError, TypeError):
            raise MoesaicError(
                "is not a latency predictor of this version", where=str(path), allowed="the output of `moesaic latency`"
            ) from None
        if predictor.device_fingerprint != device_fingerprint:
            raise MoesaicError(
                "was calibrated on another device", where=str(path), found=predictor.device, allowed=device
            )
        return predictor


def fit(terms: np.ndarray, milliseconds: np.ndarray, weights: np.ndarray) -> tuple[float, ...]:
    """Non-negative coefficients that minimise the weighted squared relative error. ``terms`` is [n, len(TERMS)]."""
    relative = terms / milliseconds[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    solution, _ = nnls(relative / scale * weights[:, None], weights)
    return tuple(float(value) for value in solution / scale)
