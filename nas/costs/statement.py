"""The price of one architecture as a statement: every cost, expected and worst, and FLOPs layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from moesaic.nas.config import DeviceConfig
from moesaic.nas.context import Context
from moesaic.nas.costs.analytic import flops_breakdown
from moesaic.nas.costs.latency.probe import random_passes
from moesaic.nas.costs.latency.timing import Timer, time_alone
from moesaic.nas.costs.price import Pricer
from moesaic.nas.device import choose_device
from moesaic.nas.terminal.tables import plain_table, what_costs_are_per
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, draw


def build_statement(architecture: Architecture, context: Context) -> dict[str, Any]:
    """All costs in base units. Latency is measured, with random weights, on this device."""
    pricer = Pricer(context)
    uses = pricer.expected_uses(architecture)
    layers, vocabulary = flops_breakdown(architecture, uses, context)
    device = choose_device(DeviceConfig())
    (one,) = random_passes([architecture], context, device, seed=0)
    return {
        "fingerprint": architecture.fingerprint,
        "context": asdict(context),
        "expected": dict(pricer.expected(architecture)),
        "worst": dict(pricer.worst(architecture)),
        "measured_latency_ms": time_alone(one, Timer.of(device.kind)),
        "device": str(device),
        "flops_per_layer": layers,
        "flops_vocabulary": vocabulary,
    }


def print_statement(console: Console, architecture: Architecture, statement: dict[str, Any]) -> None:
    for line in draw(architecture).split("\n"):
        console.print(Text(line))
    table = plain_table("Costs", "cost|expected|worst case", "cost")
    for name, value in statement["expected"].items():
        form = DIMENSIONS[name].format
        table.add_row(name, form(value), form(statement["worst"][name]))
    table.add_row("latency", DIMENSIONS["latency"].format(statement["measured_latency_ms"]), "measured")
    console.print(table)
    parts = list(statement["flops_per_layer"][0])
    layers = plain_table("FLOPs per token", "|".join(["layer", *parts]), "layer")
    form = DIMENSIONS["flops"].format
    for index, layer in enumerate(statement["flops_per_layer"]):
        layers.add_row(str(index), *(form(layer[part]) if layer[part] else "-" for part in parts))
    layers.add_row("vocabulary", form(statement["flops_vocabulary"]))
    console.print(layers)
    context = Context(**statement["context"])
    console.print(Text(what_costs_are_per(context)))
    console.print(
        Text(
            f"Vocabulary {context.vocab_size}; device {statement['device']}. A threshold router is priced "
            "as if it could not tell experts apart."
        )
    )
