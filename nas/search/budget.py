"""Hard budgets: which architectures fit, the cheapest value each line can reach, and why nothing fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from nas.config import Config
from nas.costs.price import Costs, Pricer
from nas.units import DIMENSIONS, format_cost
from search_spaces import Architecture, FeedForward, Layer, MoesaicError, SearchSpace, neighbours
from search_spaces.space import LayerSpace


@dataclass(frozen=True)
class BudgetLine:
    """``cost`` must not exceed ``limit`` (base units) in the expected or the worst case."""

    cost: str
    limit: float
    bind: Literal["expected", "worst"]

    def __str__(self) -> str:
        return f"{self.cost} <= {format_cost(self.cost, self.limit)}" + (" (worst case)" if self.bind == "worst" else "")


@dataclass(frozen=True)
class Budget:
    """All lines hold at once."""

    lines: tuple[BudgetLine, ...]
    pricer: Pricer

    def excess(self, architecture: Architecture) -> dict[str, float]:
        """Relative excess over each line, negative inside: cost / limit - 1."""
        expected = self.pricer.expected(architecture)
        worst = self.pricer.worst(architecture) if any(line.bind == "worst" for line in self.lines) else expected
        return {
            line.cost: (worst if line.bind == "worst" else expected)[line.cost] / line.limit - 1 for line in self.lines
        }

    def fits(self, architecture: Architecture) -> bool:
        return max(self.excess(architecture).values()) <= 0

    def measured_excess(self, measured: Costs) -> dict[str, float]:
        """The same for costs under the loads of an evaluation; worst-case lines hold for any load."""
        return {line.cost: measured[line.cost] / line.limit - 1 for line in self.lines if line.bind == "expected"}


def resolve_budget(config: Config, space: SearchSpace, pricer: Pricer) -> Budget:
    """The budget in base units; relative lines are shares of the largest architecture's cost."""
    largest = {"expected": pricer.expected(space.largest), "worst": pricer.worst(space.largest)}
    limits = config.limits()
    lines = [
        BudgetLine(name, limits[name].resolve(largest[line.bind][name]), line.bind)
        for name, line in config.budget.items()
    ]
    return Budget(tuple(lines), pricer)


def cheapest(space: SearchSpace, pricer: Pricer, cost: str, bind: str = "expected") -> Architecture:
    """The member with the least ``cost``: least width and depth, and each layer its cheapest choice."""
    price = pricer.worst if bind == "worst" else pricer.expected
    best = space.smallest
    for position, layer_space in enumerate(space.layers[: len(best.decoder.layers)]):
        layers = best.decoder.layers
        candidates = [
            space.build(best.decoder.width, (*layers[:position], layer, *layers[position + 1 :]))
            for layer in _small_layers(layer_space)
        ]
        best = min(candidates, key=lambda a: price(a)[cost])
    return best


def _small_layers(space: LayerSpace) -> Iterator[Layer]:
    """Layers of which one is the cheapest whatever the cost: all sizes least, any heads, count and router."""
    for attention in space.attentions:
        for group in space.groups:
            for router in group.routers:
                part = FeedForward((group.sizes[0],) * group.experts, router, group.shared_sizes[0])
                yield Layer(attention, part)


def a_member_inside(space: SearchSpace, budget: Budget) -> Architecture:
    """Some architecture that fits.

    Raises
    ------
    MoesaicError : nothing does; says which line binds and the cheapest value that can be reached.
    """
    starts = []
    for line in budget.lines:
        start = cheapest(space, budget.pricer, line.cost, line.bind)
        excess = budget.excess(start)[line.cost]
        if excess > 0:
            reachable = line.limit * (1 + excess)
            raise MoesaicError(
                f"no architecture of space {space.name} meets the budget: {line.cost} binds",
                where=f"budget.{line.cost}",
                found=format_cost(line.cost, line.limit),
                allowed=f"at least {format_cost(line.cost, reachable)}, the cheapest that the space can reach",
                nearest=DIMENSIONS[line.cost].format(reachable * 1.001),
            )
        starts.append(start)
    found = [_descend(space, budget, start) for start in starts]
    best = min(found, key=lambda a: max(budget.excess(a).values()))
    excess = budget.excess(best)
    if max(excess.values()) > 0:
        binding = max(excess, key=lambda name: excess[name])
        line = next(line for line in budget.lines if line.cost == binding)
        reachable = line.limit * (1 + excess[binding])
        raise MoesaicError(
            "each budget line can be met, but no architecture was found that meets all of them at once",
            where=f"budget.{binding}",
            found=" and ".join(map(str, budget.lines)),
            allowed=f"with the other lines as they are, {binding} of {format_cost(binding, reachable)} can be reached",
            nearest=DIMENSIONS[binding].format(reachable * 1.001),
        )
    return best


def _descend(space: SearchSpace, budget: Budget, start: Architecture) -> Architecture:
    """Step to the neighbour with the least excess until it fits or none is better."""
    while True:
        excess = max(budget.excess(start).values())
        if excess <= 0:
            return start
        best = min(neighbours(space, start), key=lambda a: max(budget.excess(a).values()), default=start)
        if max(budget.excess(best).values()) >= excess:
            return start
        start = best


def cost_ranges(space: SearchSpace, pricer: Pricer, samples: list[Architecture]) -> dict[str, Mapping[str, float]]:
    """Per cost: ``smallest`` and ``largest`` in the space, ``typical`` (median of ``samples``), ``worst`` of the largest."""
    priced = [pricer.expected(a) for a in samples]
    largest, worst = pricer.expected(space.largest), pricer.worst(space.largest)
    ranges = {}
    for cost in largest:
        values = sorted(costs[cost] for costs in priced)
        ranges[cost] = {
            "smallest": pricer.expected(cheapest(space, pricer, cost))[cost],
            "typical": values[len(values) // 2],
            "largest": largest[cost],
            "worst": worst[cost],
        }
    return ranges
