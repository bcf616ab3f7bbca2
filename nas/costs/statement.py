"""A cost statement of one architecture: every cost, expected and worst case, and FLOPs layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from moesaic.nas.config import DeviceConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.analytic import flops_breakdown
from moesaic.nas.costs.count import Counted
from moesaic.nas.costs.latency.probe import random_passes
from moesaic.nas.costs.latency.timing import Timer, time_alone
from moesaic.nas.costs.price import Costs, Pricer
from moesaic.nas.device import choose_device
from moesaic.nas.terminal.tables import plain_table, what_costs_are_per
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, draw
from moesaic.search_spaces.architecture import layer_names


@dataclass(frozen=True)
class Statement:
    """Costs in base units; ``flops_per_layer`` by part, under the names of the layers' slots; ``counted`` are FLOPs by
    several counters, if asked for."""

    fingerprint: str
    context: Context
    expected: Costs
    worst: Costs
    measured_latency_ms: float
    device: str
    flops_per_layer: dict[str, dict[str, float]]
    flops_vocabulary: float
    counted: tuple[Counted, ...] = ()

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def build_statement(architecture: Architecture, context: Context) -> Statement:
    """Latency is measured on this device, with random weights."""
    pricer = Pricer(context)
    layers, vocabulary = flops_breakdown(architecture, pricer.expected_uses(architecture), context)
    device = choose_device(DeviceConfig())
    (one,) = random_passes([architecture], context, device, seed=0)
    return Statement(
        fingerprint=architecture.fingerprint,
        context=context,
        expected=dict(pricer.expected(architecture)),
        worst=dict(pricer.worst(architecture)),
        measured_latency_ms=time_alone(one, Timer.of(device.kind)),
        device=str(device),
        flops_per_layer={str(slot): parts for slot, parts in layers.items()},
        flops_vocabulary=vocabulary,
    )


def print_statement(console: Console, architecture: Architecture, statement: Statement) -> None:
    for line in draw(architecture).split("\n"):
        console.print(Text(line))
    table = plain_table("Costs", "cost|expected|worst case", "cost")
    for name, value in statement.expected.items():
        form = DIMENSIONS[name].format
        table.add_row(name, form(value), form(statement.worst[name]))
    table.add_row("latency", DIMENSIONS["latency"].format(statement.measured_latency_ms), "measured")
    console.print(table)
    parts = list(next(iter(statement.flops_per_layer.values())))
    layers = plain_table("FLOPs per token", "|".join(["layer", *parts]), "layer")
    form = DIMENSIONS["flops"].format
    for slot, name in layer_names(architecture.layers).items():
        layer = statement.flops_per_layer[str(slot)]
        layers.add_row(f"layer {name}", *(form(layer[part]) if layer[part] else "-" for part in parts))
    layers.add_row("vocabulary", form(statement.flops_vocabulary))
    console.print(layers)
    if statement.counted:
        counted = plain_table("FLOPs per token under the load of one pass", "by|counted|leaves out", "by|leaves out")
        for row in statement.counted:
            counted.add_row(row.counter, f"{row.flops:,.0f}", row.leaves_out)
        console.print(counted)
    console.print(Text(what_costs_are_per(statement.context)))
    console.print(
        Text(
            f"Vocabulary {statement.context.vocab_size}; device {statement.device}. A threshold router is priced "
            "as if it could not tell experts apart."
        )
    )
