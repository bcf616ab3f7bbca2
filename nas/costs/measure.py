"""What a model really costs on this device: the counterpart of every predicted cost."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic.nas.costs.latency.predictor import LEVEL, LatencyPredictor
from moesaic.nas.costs.latency.probe import Pass, autocast, random_passes, text_tokens
from moesaic.nas.costs.latency.timing import Beside, Timer, time_beside
from moesaic.nas.costs.price import Pricer
from moesaic.nas.device import Device
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture
from moesaic.supernet import Transformer, evaluate


class PeakMemory(TorchDispatchMode):
    """Counts bytes of tensors that are born while it is on and still alive; ``peak`` is the most at any time."""

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
    """Most bytes of activations alive at once in a pass, with its cache; weights do not count."""
    kept = [one.tokens, *one.model.parameters(), *([] if one.cache is None else one.cache.tensors)]
    with PeakMemory() as memory:
        memory._known.update(tensor.untyped_storage()._cdata for tensor in kept)  # so that a view is not a birth
        one()
    return memory.peak + (0 if one.cache is None else one.cache.bytes)


@dataclass(frozen=True)
class MeasuredCosts:
    """``costs`` as a ``Pricer`` names them, latency as on the machine when it was calibrated; ``timing`` says how it
    was before it was corrected."""

    costs: dict[str, float]
    timing: Beside


def measure_costs(
    model: Transformer, windows: Tensor, pricer: Pricer, device: Device, most_ms: float = math.inf
) -> MeasuredCosts:
    """Every cost of ``pricer``, which has a predictor, measured on ``model``: time and memory on this device, routing
    on ``windows``.

    ``parameters`` and the weights' memory are counted, FLOPs and active parameters follow from the routing that was
    seen, latency is that of passes beside the predictor's anchors. A latency of more than ``most_ms`` is measured twice
    more, with the anchors built anew, and the middle one of the three holds: one timing that something disturbed shall
    not condemn a model, nor (as the least of them would) a lucky one clear it.
    """
    assert pricer.predictor is not None
    context = pricer.context
    one = Pass(model, text_tokens(windows, context), context, device)
    with autocast(device):
        loads = evaluate(model, windows).loads
    costs = dict(pricer.measured(model.architecture, loads))
    count = sum(parameter.numel() for parameter in model.parameters())
    costs["parameters"] = float(count)
    costs["memory"] = float(4 * count + peak_activation_bytes(one))
    timing = time_pass(one, pricer.predictor, device)
    if timing.corrected_ms > most_ms:
        again = [time_pass(one, pricer.predictor, device) for _ in range(2)]
        timing = sorted([timing, *again], key=lambda timed: timed.corrected_ms)[1]
    costs["latency"] = timing.corrected_ms
    return MeasuredCosts(costs, timing)


def time_pass(one: Pass, predictor: LatencyPredictor, device: Device) -> Beside:
    """Time a pass beside the anchors of ``predictor``, built again."""
    passes = rebuilt_anchors(predictor, device)
    times = [anchor.milliseconds for anchor in predictor.anchors]
    return time_beside(one, list(zip(passes, times, strict=True)), Timer.of(device.kind))


def rebuilt_anchors(predictor: LatencyPredictor, device: Device) -> list[Pass]:
    architectures = [
        Architecture.from_dict(anchor.architecture, "an anchor of the latency predictor")
        for anchor in predictor.anchors
    ]
    return random_passes(architectures, predictor.context, device, predictor.anchor_seed)


def latency_figures(timing: Beside, predicted: float, predictor: LatencyPredictor) -> dict[str, float]:
    """What is kept of a measured latency beside its prediction, in milliseconds."""
    low, high = predictor.interval().around(predicted)
    return {**asdict(timing), "predicted_ms": predicted, "low_ms": low, "high_ms": high, "confidence": LEVEL}


def latency_text(latency: Mapping[str, float]) -> str:
    """``latency_figures`` as a sentence."""
    form = DIMENSIONS["latency"].format
    difference = latency["corrected_ms"] / latency["predicted_ms"] - 1
    return (
        f"Latency: predicted {form(latency['predicted_ms'])} ({latency['confidence']:.0%} interval "
        f"{form(latency['low_ms'])} to {form(latency['high_ms'])}). Measured {form(latency['raw_ms'])} on a machine "
        f"that took {latency['anchor_ratio']:.2f} times as long as at its calibration for the same anchor models; "
        f"corrected for that {form(latency['corrected_ms'])}, {difference:+.1%} from "
        "the prediction. The budget is judged by the corrected figure."
    )
