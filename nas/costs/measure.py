"""Measures a model's costs on this device: the counterpart of every predicted cost."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic.kernels import inference
from moesaic.nas.costs.latency.predictor import LEVEL, LatencyPredictor
from moesaic.nas.costs.latency.probe import Pass, random_passes, text_pass
from moesaic.nas.costs.latency.timing import AnchoredTiming, Timer, time_with_anchors
from moesaic.nas.costs.price import Pricer
from moesaic.nas.device import Device
from moesaic.nas.units import DIMENSIONS
from moesaic.supernet import Batch, LayerLoad, Transformer


class PeakMemory(TorchDispatchMode):
    """Counts bytes of live tensors that were created while it is active; ``peak`` is the maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def gone() -> None:
            self._known.discard(key)
            self.alive -= size

        weakref.finalize(storage, gone)


def peak_activation_bytes(one: Pass) -> int:
    """Peak bytes of activations in a pass, with its cache; weights do not count.

    On a GPU it is the peak of torch's allocator, which sees what operators allocate inside; on a CPU, the peak of the
    tensors that operators return.
    """
    inference.release()  # the buffer of another model
    one()  # the first pass also fills caches that outlive it
    if one.device.kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with PeakMemory() as memory:
            # So that a view of one does not count as new.
            memory._known.update(tensor.untyped_storage()._cdata for tensor in one.kept)
            one()
        peak = memory.peak
    return peak + (0 if one.cache is None else one.cache.bytes)


@dataclass(frozen=True)
class LatencyFigures:
    """A measured latency beside its prediction, in milliseconds.

    ``raw_ms`` is what a pass took, ``corrected_ms`` what it would have taken at the machine's speed during calibration;
    ``confidence`` is that of the predicted interval from ``low_ms`` to ``high_ms``.
    """

    raw_ms: float
    corrected_ms: float
    anchor_ratio: float
    error: float
    predicted_ms: float
    low_ms: float
    high_ms: float
    confidence: float

    @staticmethod
    def of(timing: AnchoredTiming, predicted_ms: float, predictor: LatencyPredictor) -> LatencyFigures:
        low, high = predictor.interval().around(predicted_ms)
        return LatencyFigures(
            timing.raw_ms,
            timing.corrected_ms,
            timing.anchor_ratio,
            timing.error,
            predicted_ms,
            low,
            high,
            LEVEL,
        )

    def __str__(self) -> str:
        form = DIMENSIONS["latency"].format
        return (
            f"Latency: predicted {form(self.predicted_ms)} ({self.confidence:.0%} interval {form(self.low_ms)} to "
            f"{form(self.high_ms)}). Measured {form(self.raw_ms)} on a machine that took {self.anchor_ratio:.2f} times "
            f"as long as at its calibration for the same anchor models; corrected for that {form(self.corrected_ms)}, "
            f"{self.corrected_ms / self.predicted_ms - 1:+.1%} from the prediction. The budget is judged by the "
            "corrected figure."
        )


def latency_text(figures: LatencyFigures | None) -> str:
    """A measured latency beside its prediction, or why there is none."""
    return str(figures or "Latency was not measured: no budget line and no objective needs it.")


@dataclass(frozen=True)
class MeasuredCosts:
    """``costs`` as a ``Pricer`` names them, with latency corrected to the machine's speed during calibration, and how
    it was timed; None without a calibration."""

    costs: dict[str, float]
    latency: LatencyFigures | None


def measure_costs(
    model: Transformer,
    loads: Sequence[LayerLoad | None],
    batch: Batch,
    pricer: Pricer,
    device: Device,
    limit_ms: float = math.inf,
) -> MeasuredCosts:
    """Every cost of ``pricer`` measured on ``model`` on this device.

    ``parameters`` and the weights' memory are counted. FLOPs and active parameters follow from the ``loads`` of an
    evaluation. Latency is that of passes over the text of ``batch``, timed beside the predictor's anchors. One over
    ``limit_ms`` is measured twice more, with new anchors, and the median of the three counts: one disturbed timing must
    not rule out a model, and the minimum of three would favour a lucky one.
    """
    one = text_pass(model, batch, pricer.context, device)
    costs = dict(pricer.measured(model.architecture, loads))
    count = sum(parameter.numel() for parameter in model.parameters())
    costs["parameters"] = float(count)
    costs["memory"] = float(4 * count + peak_activation_bytes(one))
    if pricer.predictor is None:
        return MeasuredCosts(costs, None)
    timing = time_pass(one, pricer.predictor, device, limit_ms)
    if timing.corrected_ms > limit_ms:
        again = [time_pass(one, pricer.predictor, device, limit_ms) for _ in range(2)]
        timing = sorted([timing, *again], key=lambda timed: timed.corrected_ms)[1]
    costs["latency"] = timing.corrected_ms
    predicted = pricer.expected(model.architecture)["latency"]
    return MeasuredCosts(costs, LatencyFigures.of(timing, predicted, pricer.predictor))


def time_pass(one: Pass, predictor: LatencyPredictor, device: Device, limit_ms: float = math.inf) -> AnchoredTiming:
    """Time a pass beside the anchors of ``predictor``, which are rebuilt; see ``time_with_anchors``."""
    passes = rebuilt_anchors(predictor, device)
    times = [anchor.milliseconds for anchor in predictor.anchors]
    return time_with_anchors(one, list(zip(passes, times, strict=True)), Timer.of(device.kind), limit_ms)


def rebuilt_anchors(predictor: LatencyPredictor, device: Device) -> list[Pass]:
    architectures = [anchor.architecture for anchor in predictor.anchors]
    vocab_sizes = [anchor.vocab_size for anchor in predictor.anchors]
    return random_passes(architectures, predictor.context, device, predictor.anchor_seed, vocab_sizes)
