"""Costs as HAT and AutoMoE publish them: of one teacher-forced pass, without embeddings and vocabulary layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from moesaic.nas.context import Context
from moesaic.nas.costs.price import Pricer
from moesaic.nas.terminal.tables import plain_table
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces import Architecture, draw

WMT_LENGTH = 30
"""Tokens of HAT's sentence for WMT, source and target; that for IWSLT has 23."""


@dataclass(frozen=True)
class HatCosts:
    """``flops`` are those of a source and a target of ``sequence_length`` tokens, through encoder and decoder once.
    ``params`` are all weights but embeddings, ``active_params`` those that a token meets on average."""

    sequence_length: int
    params: int
    active_params: int
    flops: int

    @property
    def sparsity(self) -> float:
        """Share of the weights that a token does not meet."""
        return 1 - self.active_params / self.params

    def plain(self) -> dict[str, Any]:
        return {"convention": "hat", **asdict(self), "sparsity": self.sparsity}


def hat_costs(architecture: Architecture, sequence_length: int = WMT_LENGTH) -> HatCosts:
    """FLOPs are 2 x multiply-accumulates as torchprofile counts them, which HAT used: beside the products, one for each
    value of a norm, of a query and of an embedding that is scaled, 0.5 per mille in all. Without these, 10 of HAT's 44
    figures differ in the last digit. Routers are counted, and their load is taken to be even."""
    context = Context(0, sequence_length, source_length=sequence_length)  # without a vocabulary
    costs = Pricer(context).expected(architecture)
    backbone = architecture.backbone
    scaled = sum(stack.width for stack in architecture.stacks.values())
    for slot, layer in architecture.layers.items():
        attentions = [layer.attention, *([layer.cross] if layer.cross else [])]
        scaled += layer.blocks * architecture.width_at(slot) + sum(backbone.widths(one)[0] for one in attentions)
    positions = (backbone.max_positions or 0) * sum(stack.width for stack in architecture.stacks.values())
    return HatCosts(
        sequence_length=sequence_length,
        params=round(costs["parameters"] - positions),
        active_params=round(costs["active_parameters"] - positions),
        flops=round((costs["flops"] + 2 * scaled) * sequence_length),
    )


def print_hat_costs(console: Console, architecture: Architecture, costs: HatCosts) -> None:
    for line in draw(architecture).split("\n"):
        console.print(Text(line))
    table = plain_table("Costs as HAT counts them", "cost|value", "cost")
    table.add_row("parameters", f"{costs.params:,}")
    table.add_row("active parameters", f"{costs.active_params:,} (sparsity {costs.sparsity:.1%})")
    table.add_row("FLOPs", f"{costs.flops:,} ({DIMENSIONS['flops'].format(costs.flops)})")
    console.print(table)
    console.print(
        Text(f"One pass of {costs.sequence_length} source and target tokens, without embeddings and vocabulary layer.")
    )
