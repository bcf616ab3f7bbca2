"""Predicts every cost of an architecture in microseconds, so that a search can refuse it before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moesaic.nas.context import Context
from moesaic.nas.costs.analytic import active_parameters, flops, parameters
from moesaic.nas.costs.latency.predictor import LatencyPredictor
from moesaic.nas.costs.memory import activation_memory, weight_memory
from moesaic.nas.costs.use import LayerUse, Occupancy, dense_use, measured_use, worst_use
from moesaic.search_spaces import Architecture, FeedForward, Slot
from moesaic.supernet.evaluate import LayerLoad

Costs = Mapping[str, float]
"""flops (per token), latency (ms per batch), parameters, active_parameters, memory (bytes): base units of ``units``."""


@dataclass(frozen=True)
class Pricer:
    """Prices architectures in one context. Without a ``predictor`` there is no latency."""

    context: Context
    occupancy: Occupancy = field(default_factory=Occupancy)
    predictor: LatencyPredictor | None = None
    _expected: dict[tuple[Slot, FeedForward], LayerUse] = field(default_factory=dict, repr=False, compare=False)

    def expected_uses(self, architecture: Architecture) -> list[LayerUse]:
        return [self.expected_use(slot, layer.feed_forward) for slot, layer in architecture.layers.items()]

    def expected_use(self, slot: Slot, part: FeedForward) -> LayerUse:
        use = self._expected.get((slot, part))
        if use is None:
            extent = self.context.extent(slot.stack)
            use = self._expected[slot, part] = self.occupancy.expected(slot, part, extent)
        return use

    def expected(self, architecture: Architecture) -> Costs:
        """Costs under the expected load of each layer."""
        return self.price(architecture, self.expected_uses(architecture))

    def worst(self, architecture: Architecture) -> Costs:
        """Costs when every token takes the most and the largest experts that its routers allow."""
        return self.price(architecture, self.worst_uses(architecture))

    def worst_uses(self, architecture: Architecture) -> list[LayerUse]:
        return [self.worst_use(slot, layer.feed_forward) for slot, layer in architecture.layers.items()]

    def worst_use(self, slot: Slot, part: FeedForward) -> LayerUse:
        return worst_use(part, self.context.extent(slot.stack))

    def measured(self, architecture: Architecture, loads: Sequence[LayerLoad | None]) -> Costs:
        """Costs under the loads that an evaluation measured."""
        return self.price(architecture, self.measured_uses(architecture, loads))

    def measured_uses(self, architecture: Architecture, loads: Sequence[LayerLoad | None]) -> list[LayerUse]:
        return [
            dense_use(layer.feed_forward)
            if load is None
            else measured_use(layer.feed_forward, load, self.context.extent(slot.stack))
            for (slot, layer), load in zip(architecture.layers.items(), loads, strict=True)
        ]

    def price(self, architecture: Architecture, uses: Sequence[LayerUse]) -> Costs:
        """Costs when the layers are used as ``uses`` say."""
        context = self.context
        costs = {
            "flops": flops(architecture, uses, context),
            "parameters": float(parameters(architecture, context)),
            "active_parameters": active_parameters(architecture, uses, context),
            "memory": weight_memory(architecture, context) + activation_memory(architecture, uses, context),
        }
        if self.predictor is not None:
            costs["latency"] = self.predictor.predict(architecture, uses)
        return costs
