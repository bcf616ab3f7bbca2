"""A latency predictor: a sum over layers of terms with a physical meaning and non-negative coefficients.

The terms count what a pass does (products, elements moved, weights read, launches). A coefficient is the time of one
unit on one device, fitted to whole models measured there. Non-negative coefficients extrapolate safely beyond the
measured points (ridge regression on the same terms diverges).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from operator import mul
from typing import Any

import numpy as np

from moesaic.nas.context import Context, Extent
from moesaic.nas.costs.analytic import head_products
from moesaic.nas.costs.latency.fitting import Accuracy, Interval
from moesaic.nas.costs.use import LayerUse
from moesaic.nas.device import Device
from moesaic.search_spaces import Architecture, Backbone, Damaged, Layer, MoesaicError
from moesaic.search_spaces.architecture import ArchitectureField
from moesaic.search_spaces.files import PathLike, read_json, write_json
from moesaic.search_spaces.yaml_source import adapter

TERMS = (
    "pass",  # 1; of a translation, the steps of its decoder
    "vocabulary_products",  # multiply-accumulates of the head
    "attentions",  # and cross-attentions
    "block_elements",  # tokens x width of the parts of a layer: norms and residuals
    "projection_products",  # multiply-accumulates of q, k, v and o
    "score_products",  # queries x positions x width of the heads
    "cache_elements",  # cached keys and values read
    "dense_experts",  # dense feed-forward parts, shared experts, and the hidden layers of MLP routers
    "dense_products",
    "sparse_layers",
    "router_scores",  # tokens x experts
    "live_experts",
    "pair_elements",  # gathered and scattered
    "expert_products",  # multiply-accumulates over whole row tiles, each of which reads its expert's weights
    "hidden_elements",  # activations of the experts
)
LEVEL = 0.95
"""Confidence of the interval shown with predictions."""


def layer_terms(
    width: int, memory_width: int, layer: Layer, use: LayerUse, backbone: Backbone, extent: Extent
) -> tuple[float, ...]:
    """Terms of one layer in all its passes (the first two belong to the whole model and are 0)."""
    attention, part, passes, tokens = layer.attention, layer.feed_forward, extent.passes, extent.all_tokens
    q, kv = backbone.widths(attention)
    per_neuron = backbone.matrices * width
    elements, positions = tokens * width, extent.mean_keys
    common = [
        0,
        0,
        passes * (attention.heads > 0),
        layer.blocks * elements,
        2 * elements * (q + kv),
        tokens * positions * q,
        passes * extent.sequences * positions * kv,
    ]
    if layer.cross is not None:
        across, kept = backbone.widths(layer.cross)
        read = extent.read * layer.cross.span
        common[2] += passes
        common[4] += 2 * (elements * across + extent.sources * read * memory_width * kept)
        common[5] += tokens * read * across
        common[6] += passes * extent.sources * read * kept
    if part.router is None:
        return (*common, passes * part.experts, tokens * per_neuron * part.neurons, 0, 0, 0, 0, 0, 0)
    hidden = part.router.hidden(width)
    return (
        *common,
        passes * ((part.shared_size > 0) + (hidden > 0)),
        tokens * (per_neuron * part.shared_size + hidden * (width + part.experts)),
        passes,
        tokens * part.experts,
        passes * use.live_experts,
        elements * use.pairs,
        tokens * per_neuron * use.tiled_neurons,
        tokens * use.neurons,
    )


def model_terms(architecture: Architecture, uses: Sequence[LayerUse], context: Context) -> np.ndarray:
    """[len(TERMS)]: the terms of a pass through a whole model."""
    total = np.zeros(len(TERMS))
    total[:2] = context.output.passes, context.tokens * head_products(architecture, context)
    backbone, memory = architecture.backbone, architecture.memory_width
    for (slot, layer), use in zip(architecture.layers.items(), uses, strict=True):
        total += layer_terms(architecture.width_at(slot), memory, layer, use, backbone, context.extent(slot.stack))
    return total


@dataclass(frozen=True)
class Anchor:
    """A model that can be rebuilt, and the time of its pass at the calibration's median speed.

    Timed beside another model, anchors show how fast the machine is at that moment.
    """

    architecture: ArchitectureField
    vocab_size: int
    milliseconds: float


@dataclass(frozen=True)
class Measured:
    """How a calibration was measured: models, measurements (including anchors), and the seconds they took.

    ``noise`` is the spread of repeats (interquartile range over median; median over models) after drift correction,
    ``raw_noise`` before. A pass took ``fastest`` to ``slowest`` of its median time (5th and 95th percentile);
    ``drift_seconds`` is the time scale of that change (None: no drift). ``remeasured`` models had repeats that
    disagreed, or an extreme residual. ``shallow`` of the models have few layers and a small vocabulary, because whole
    ones would have taken longer than the time limit.
    """

    models: int
    shallow: int
    measurements: int
    seconds: float
    noise: float
    raw_noise: float
    slowest: float
    fastest: float
    drift_seconds: float | None
    remeasured: int
    date: str
    clock_mhz: float | None


@dataclass(frozen=True)
class LatencyPredictor:
    """Coefficients in milliseconds per unit of each term, for one device and context.

    ``log_residuals`` are log(measured / predicted) of each fitted model when it is left out, or, beside shallow models,
    of the whole ones, to which only the scale is fitted. ``accuracy`` and ``coverage`` (share inside the interval at
    ``LEVEL``) are of whole models that their prediction was not fitted to.
    The weights of all ``anchors`` follow from ``anchor_seed``.
    """

    coefficients: tuple[float, ...]
    log_residuals: tuple[float, ...]
    context: Context
    device: str
    device_fingerprint: str
    anchors: tuple[Anchor, ...]
    anchor_seed: int
    accuracy: Accuracy
    coverage: float
    measured: Measured

    def predict(self, architecture: Architecture, uses: Sequence[LayerUse]) -> float:
        """Milliseconds of one forward pass."""
        context, coefficients = self.context, self.coefficients
        backbone, memory = architecture.backbone, architecture.memory_width
        total = coefficients[0] * context.output.passes
        total += coefficients[1] * context.tokens * head_products(architecture, context)
        for (slot, layer), use in zip(architecture.layers.items(), uses, strict=True):
            width, extent = architecture.width_at(slot), context.extent(slot.stack)
            total += sum(map(mul, coefficients, layer_terms(width, memory, layer, use, backbone, extent)))
        return total

    def interval(self, confidence: float = LEVEL) -> Interval:
        """The interval of a measurement with probability ``confidence``, as multiples of its prediction."""
        return _interval(self.log_residuals, confidence)

    def margin(self, confidence: float) -> float:
        """The factor on a prediction that a measurement stays below with probability ``confidence``, in (0.5, 1): the
        upper end of the interval that leaves out equal shares below and above."""
        return self.interval(2 * confidence - 1).high

    def describe(self) -> str:
        """The predictor's accuracy on held-out models, and how steady the machine was."""
        good, measured = self.accuracy, self.measured
        within = "" if good.tau_within_depth is None else f" ({good.tau_within_depth:.2f} among models of equal depth)"
        shallow = f"calibrated on {measured.shallow} models of 1 or 2 layers, since whole ones take too long; "
        return (
            f"{shallow if measured.shallow else ''}"
            f"on {good.count} held-out models the mean absolute error is {good.mape:.1%} (bias {good.bias:+.1%}), "
            f"{good.within_5_percent:.0%} are within 5 %, {good.within_10_percent:.0%} within 10 %, "
            f"{self.coverage:.0%} inside the {LEVEL:.0%} interval, Kendall's tau is {good.tau:.2f}{within}; "
            f"{measured.measurements} measurements in {measured.seconds:.0f} s, in which the machine took "
            f"{measured.fastest:.2f} to {measured.slowest:.2f} of its median time; repeats spread by "
            f"{measured.noise:.1%} after drift correction, {measured.raw_noise:.1%} before"
        )

    def save(self, path: PathLike) -> None:
        data = adapter(LatencyPredictor).dump_python(self, mode="json")
        data["coefficients"] = dict(zip(TERMS, self.coefficients, strict=True))
        write_json(path, data | {"interval": asdict(self.interval())})

    @staticmethod
    def load(path: PathLike, device: Device) -> LatencyPredictor:
        """Read a predictor. Raises MoesaicError for a damaged file or one calibrated on another device."""
        data: dict[str, Any] = read_json(path)
        try:
            del data["interval"]  # follows from the residuals
            data["coefficients"] = [data["coefficients"][name] for name in TERMS]
            predictor = adapter(LatencyPredictor).validate_python(data)
            if not np.isfinite([*predictor.coefficients, *predictor.log_residuals]).all():
                raise ValueError
            predictor.interval()
        except (KeyError, TypeError, ValueError):  # pydantic's errors are ValueErrors
            problem = "is not a latency predictor of this version"
            raise Damaged(problem, path, allowed="the output of `moesaic latency`") from None
        if predictor.device_fingerprint != device.fingerprint:
            raise MoesaicError(
                "was calibrated on another device", where=str(path), found=predictor.device, allowed=str(device)
            )
        return predictor


@lru_cache(maxsize=256)
def _interval(log_residuals: tuple[float, ...], confidence: float) -> Interval:
    return Interval.of(np.array(log_residuals), confidence)
