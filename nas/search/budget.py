"""Hard budgets: which architectures fit, the lowest value each line can reach, and why nothing fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

from moesaic.nas.config import LimitConfig
from moesaic.nas.costs.price import Costs, Pricer
from moesaic.nas.units import DIMENSIONS, format_cost, parse_limit
from moesaic.search_spaces import Architecture, FeedForward, Layer, MoesaicError, SearchSpace, Slot, neighbours
from moesaic.search_spaces.space import LayerSpace


@dataclass(frozen=True)
class BudgetLine:
    """``cost`` must not exceed ``limit`` (base units) in the expected or the worst case.

    A latency line may have a ``confidence``: the probability that a measurement does not exceed the limit.
    """

    cost: str
    limit: float
    bind: Literal["expected", "worst"]
    confidence: float | None = None

    def __str__(self) -> str:
        case = " (worst case)" if self.bind == "worst" else ""
        sure = f" with confidence {self.confidence:.4g}" if self.confidence else ""
        return f"{self.cost} <= {format_cost(self.cost, self.limit)}{case}{sure}"


@dataclass(frozen=True)
class Budget:
    """All lines hold at once."""

    lines: tuple[BudgetLine, ...]
    pricer: Pricer

    def excess(self, architecture: Architecture, expected: Costs | None = None) -> dict[str, float]:
        """Relative excess over each line, cost / limit - 1, negative if inside. ``expected`` saves pricing it again."""
        bound = self.bound(architecture, expected)
        return {line.cost: bound[line.cost] / line.limit - 1 for line in self.lines}

    def bound(self, architecture: Architecture, expected: Costs | None = None) -> dict[str, float]:
        """The cost each line limits before evaluation: the expected or worst cost, or its upper confidence bound."""
        expected = expected or self.pricer.expected(architecture)
        worst = self.pricer.worst(architecture) if any(line.bind == "worst" for line in self.lines) else expected
        return {
            line.cost: (worst if line.bind == "worst" else expected)[line.cost] * self.margin(line)
            for line in self.lines
        }

    def margin(self, line: BudgetLine) -> float:
        """The factor on a cost of ``line`` that its confidence needs."""
        if line.confidence is None:
            return 1.0
        assert self.pricer.predictor is not None
        return self.pricer.predictor.margin(line.confidence)

    def fits(self, architecture: Architecture, expected: Costs | None = None) -> bool:
        return max(self.excess(architecture, expected).values()) <= 0

    def measured_excess(self, measured: Costs) -> dict[str, float]:
        """The same for costs under the loads of an evaluation; worst-case lines hold for any load."""
        return {
            line.cost: measured[line.cost] * self.margin(line) / line.limit - 1
            for line in self.lines
            if line.bind == "expected"
        }


def resolve_budget(limits: Mapping[str, LimitConfig], space: SearchSpace, pricer: Pricer) -> Budget:
    """The budget in base units; relative lines are shares of the highest cost in the space, or of the cost of the
    trained model that the space comes from."""
    lines = []
    for name, line in limits.items():
        price = pricer.worst if line.bind == "worst" else pricer.expected
        whole = space.source or most_expensive(space, pricer, name, line.bind)
        limit = parse_limit(line.limit, name).resolve(price(whole)[name])
        lines.append(BudgetLine(name, limit, line.bind, line.confidence))
    return Budget(tuple(lines), pricer)


def cheapest(space: SearchSpace, pricer: Pricer, cost: str, bind: str = "expected") -> Architecture:
    """The member with the least ``cost``: smallest widths and depths, and the cheapest choice in each layer."""
    return _extreme(space, pricer, cost, bind, space.smallest, min, first=True)


def most_expensive(space: SearchSpace, pricer: Pricer, cost: str, bind: str = "expected") -> Architecture:
    """The member with the most ``cost``; it need not be ``space.largest``, since a dense layer may cost more."""
    return _extreme(space, pricer, cost, bind, space.largest, max, first=False)


def _extreme(
    space: SearchSpace, pricer: Pricer, cost: str, bind: str, start: Architecture, choose: Callable, first: bool
) -> Architecture:
    """``start`` with the extreme choice in each layer. Layers with equal choices and loads have the same one.

    What a layer adds to a sum decides; what it costs alone decides for at most one, since a peak (memory) is that of
    one layer. Exact for sums, and for the largest sum with a peak.
    """
    use = pricer.worst_use if bind == "worst" else pricer.expected_use

    def alone(slot: Slot, layer: Layer, copies: int = 1) -> float:
        """The cost of a network with this layer, in ``copies``, and as little as there can be beside it."""
        widths = {name: stack.width for name, stack in start.stacks.items()}
        network = space.only(slot.stack, (layer,) * copies, widths)
        uses = [
            use(slot if at.stack == slot.stack and at.index < copies else Slot(at.stack, 0), one.feed_forward)
            for at, one in network.layers.items()
        ]
        return pricer.price(network, uses)[cost]

    def added(slot: Slot, layer: Layer) -> float:
        return alone(slot, layer, copies=2) - alone(slot, layer)

    found: dict[tuple, tuple[Layer, Layer]] = {}
    extreme, alternatives = {}, {}
    for slot in start.layers:
        choices = space.layers[slot]
        kind = (slot.stack, choices, pricer.occupancy.at(slot))
        if kind not in found:
            layers = list(_extreme_layers(choices, 0 if first else -1))
            found[kind] = choose(layers, key=partial(added, slot)), choose(layers, key=partial(alone, slot))
            alternatives[slot] = found[kind][1]
        extreme[slot] = found[kind][0]
    candidates = [extreme, *(extreme | {slot: layer} for slot, layer in alternatives.items())]
    price = pricer.worst if bind == "worst" else pricer.expected
    return choose(map(start.with_layers, candidates), key=lambda a: price(a)[cost])


def _extreme_layers(space: LayerSpace, end: int) -> Iterator[Layer]:
    """Layers with all sizes smallest (``end`` 0) or largest (-1), any heads, count and router; one is extreme."""
    for group in space.groups:
        for attention, cross, router in product(space.attentions, space.crosses, group.routers):
            part = FeedForward((group.sizes[end],) * group.experts, router, group.shared_sizes[end])
            yield Layer(attention, part, cross)


def find_feasible(space: SearchSpace, budget: Budget) -> Architecture:
    """An architecture that fits.

    Raises
    ------
    MoesaicError : none does; says which line binds and the lowest value that can be reached.
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
            "each budget line can be met alone, but no architecture was found that meets all of them",
            where=f"budget.{binding}",
            found=" and ".join(map(str, budget.lines)),
            allowed=f"with the other lines as they are, {binding} of {format_cost(binding, reachable)} can be reached",
            nearest=DIMENSIONS[binding].format(reachable * 1.001),
        )
    return best


def _descend(space: SearchSpace, budget: Budget, start: Architecture) -> Architecture:
    """Move to the neighbour with the least excess until it fits or none is better."""
    while True:
        excess = max(budget.excess(start).values())
        if excess <= 0:
            return start
        best = min(neighbours(space, start), key=lambda a: max(budget.excess(a).values()), default=start)
        if max(budget.excess(best).values()) >= excess:
            return start
        start = best


@dataclass(frozen=True)
class CostRange:
    """One cost over a space, in base units: the expected cost of the cheapest, a typical and the most expensive member,
    and the worst case of any."""

    smallest: float
    typical: float
    largest: float
    worst: float


def cost_ranges(space: SearchSpace, pricer: Pricer, samples: list[Architecture]) -> dict[str, CostRange]:
    """The range of every cost; ``typical`` is the median of ``samples``."""
    priced = [pricer.expected(a) for a in samples]
    ranges = {}
    for cost in priced[0]:
        values = sorted(costs[cost] for costs in priced)
        ranges[cost] = CostRange(
            smallest=pricer.expected(cheapest(space, pricer, cost))[cost],
            typical=values[len(values) // 2],
            largest=pricer.expected(most_expensive(space, pricer, cost))[cost],
            worst=pricer.worst(most_expensive(space, pricer, cost, "worst"))[cost],
        )
    return ranges
