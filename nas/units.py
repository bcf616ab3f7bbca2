"""Quantities with units: read ("2.5 GFLOPs", "12 ms", "50M", "1.2 GB", "60%") and printed with what they are per."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from moesaic.search_spaces.errors import MoesaicError, nearest_name

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Dimension:
    """The unit of a cost, what it is per, the scales it is printed in, and others that are accepted as input."""

    unit: str
    per: str
    printed: dict[str, float]
    accepted: dict[str, float] = field(default_factory=dict)

    @property
    def scales(self) -> dict[str, float]:
        return {**self.printed, **self.accepted}

    def format(self, value: float) -> str:
        """A readable figure with its unit: three or four significant digits in the largest scale that fits."""
        if not math.isfinite(value):
            return str(value)
        fitting = [(name, scale) for name, scale in self.printed.items() if abs(value) >= scale]
        smallest = min(self.printed.items(), key=lambda pair: pair[1])
        name, scale = max(fitting, key=lambda pair: pair[1], default=smallest)
        number = f"{value / scale:.4g}"
        return f"{number} {name}" if len(name) > 1 else f"{number}{name}"


DIMENSIONS = {
    "flops": Dimension("FLOPs", "per token", {f"{p}FLOPs": s for p, s in _DECIMAL.items()}),
    "latency": Dimension("ms", "per batch", {"us": 1e-3, "ms": 1.0, "s": 1e3}),
    "parameters": Dimension("", "in total", {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}),
    "active_parameters": Dimension("", "per token", {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}),
    "memory": Dimension(
        "B",
        "weights and activations of a batch",
        {f"{p}B": s for p, s in _DECIMAL.items()},
        {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    ),
}
"""Costs that a budget may limit, in their base units: FLOPs, milliseconds, counts, bytes."""


@dataclass(frozen=True)
class Limit:
    """An absolute ``value`` in base units, or a ``share`` of the largest architecture's cost."""

    value: float | None = None
    share: float | None = None

    def resolve(self, largest: float) -> float:
        return self.value if self.value is not None else (self.share or 0.0) * largest


def parse_limit(text: str | float, cost: str) -> Limit:
    """Read a limit on ``cost`` (a key of ``DIMENSIONS``).

    Raises
    ------
    MoesaicError : not a number, a unit of another quantity, or not positive.
    """
    dimension = DIMENSIONS[cost]
    allowed = f"a number with one of: {', '.join(name or '(none)' for name in dimension.scales)}, or %"
    match = re.fullmatch(r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*(%|[A-Za-zµ]*)\s*", str(text))
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        raise MoesaicError(f"not a quantity of {cost}", found=text, allowed=allowed)
    if number <= 0:
        raise MoesaicError(f"a budget of {text} leaves nothing to search", found=text, allowed="more than zero")
    unit = match[2].replace("µ", "u")
    if unit == "%":
        return Limit(share=number / 100)
    if unit not in dimension.scales:
        folded = {name.lower(): name for name in dimension.scales}
        if unit.lower() in folded and unit:
            unit = folded[unit.lower()]
        else:
            nearest = nearest_name(unit, [n for n in dimension.scales if n]) if unit else dimension.unit
            problem = f"{cost} is not measured in {unit}" if unit else f"{cost} needs a unit"
            raise MoesaicError(problem, found=text, allowed=allowed, nearest=nearest and f"{match[1]} {nearest}")
    return Limit(value=number * dimension.scales[unit])


def format_cost(cost: str, value: float) -> str:
    """``1.2 MFLOPs per token``."""
    dimension = DIMENSIONS[cost]
    return f"{dimension.format(value)} {dimension.per}"
