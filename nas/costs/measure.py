"""What a model really costs on this device: the counterpart of every predicted cost."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nas.costs.calibrate import autocast, measure_model
from nas.costs.price import Pricer
from nas.device import Device
from supernet import Transformer, evaluate

_REPEATS = 15


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


def peak_activation_bytes(model: Transformer, tokens: Tensor) -> int:
    """Most bytes of activations alive at once in an inference pass over ``tokens`` [B, S]; weights do not count."""
    with torch.inference_mode(), PeakMemory() as memory:
        known = [p.untyped_storage() for p in model.parameters()]  # held, so that a view does not count as a birth
        memory._known.update(storage._cdata for storage in known)
        memory._known.add(tokens.untyped_storage()._cdata)
        model(tokens)
    return memory.peak


def measure_costs(model: Transformer, windows: Tensor, pricer: Pricer, device: Device) -> dict[str, float]:
    """Every cost of ``pricer`` measured on ``model``: time and memory on this device, routing on ``windows``.

    ``parameters`` and the weights' memory are counted, FLOPs and active parameters follow from the routing that
    was seen, latency is the lower quartile of repeated passes over the context's batch.
    """
    context = pricer.context
    tokens = windows[: context.batch_size, :-1]
    if len(tokens) < context.batch_size:
        tokens = tokens.repeat(-(-context.batch_size // len(tokens)), 1)[: context.batch_size]
    tokens = tokens.to(device.torch_device)
    with autocast(device):
        loads = evaluate(model, windows, batch_size=context.batch_size).loads
        activations = peak_activation_bytes(model, tokens)
    costs = dict(pricer.measured(model.architecture, loads))
    count = sum(parameter.numel() for parameter in model.parameters())
    costs["parameters"] = float(count)
    costs["memory"] = float(4 * count + activations)
    costs["latency"] = measure_model(model, tokens, device, _REPEATS)
    return costs
