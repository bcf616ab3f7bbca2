"""Whether a measured model keeps its budget: the tolerance, the status of each line, and the words for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from moesaic.nas.units import DIMENSIONS

TOLERANCE = 0.03
"""Share by which a measurement may exceed a limit and still count as inside: about the error of a predicted
latency. A model further over is refused where there is an alternative, and flagged where there is none."""

Status = Literal["inside", "within tolerance", "over"]
STATUSES: tuple[Status, ...] = ("inside", "within tolerance", "over")
"""From best to worst."""


@dataclass(frozen=True)
class MeasuredLine:
    """A budget line of a measured model, in base units.

    ``predicted`` is the expected or the worst-case cost, by ``bind``; ``bound`` is its upper edge where there is a
    confidence.
    """

    name: str
    bind: Literal["expected", "worst"]
    confidence: float | None
    limit: float
    predicted: float
    bound: float
    measured: float
    unit: str
    status: Status

    @property
    def excess(self) -> float:
        """Relative excess over the limit, negative if inside."""
        return self.measured / self.limit - 1


@dataclass(frozen=True)
class Refused:
    """A candidate that was measured and not exported, with the budget lines it exceeds."""

    trial: int
    fingerprint: str
    validation_loss: float | None
    over: tuple[MeasuredLine, ...]


def most_tolerated(limit: float) -> float:
    """The largest measurement that still counts as inside ``limit``."""
    return limit * (1 + TOLERANCE)


def status_of(measured: float, limit: float) -> Status:
    if measured <= limit:
        return "inside"
    return "within tolerance" if measured <= most_tolerated(limit) else "over"


def worst_status(lines: Iterable[MeasuredLine]) -> Status:
    """The status of a model: that of its worst line."""
    return STATUSES[max(STATUSES.index(line.status) for line in lines)]


def worst_excess(lines: Iterable[MeasuredLine]) -> float:
    """Relative excess over the line that is exceeded most, negative if all are inside."""
    return max(line.excess for line in lines)


def lines_over(lines: Iterable[MeasuredLine]) -> tuple[MeasuredLine, ...]:
    return tuple(line for line in lines if line.status == "over")


def margin_text(line: MeasuredLine) -> str:
    """``over by 12.7%``, ``inside by 3%``: the measured cost against the limit."""
    if line.excess > 1:
        return f"over {line.measured / line.limit:.3g}×"
    return f"over by {line.excess:.1%}" if line.excess > 0 else f"inside by {abs(line.excess):.1%}"


def lines_text(lines: Iterable[MeasuredLine]) -> str:
    """``latency 12.4 ms of 11 ms (over by 12.7%)`` for each line."""
    parts = []
    for line in lines:
        form = DIMENSIONS[line.name].format
        parts.append(f"{line.name} {form(line.measured)} of {form(line.limit)} ({margin_text(line)})")
    return ", ".join(parts)


def predicted_text(line: MeasuredLine) -> str:
    """The predicted cost of a budget line, and the upper edge that a confidence binds."""
    form = DIMENSIONS[line.name].format
    sure = f" (below {form(line.bound)} with confidence {line.confidence:.4g})" if line.confidence else ""
    return form(line.predicted) + sure


def over_text(lines: Sequence[MeasuredLine]) -> str | None:
    """The warning for a model that is exported although it is over its budget; None for one that is not."""
    over = lines_over(lines)
    return f"OVER BUDGET when measured on this device: {lines_text(over)}" if over else None


def refused_text(refused: Sequence[Refused]) -> str | None:
    """The candidates that were measured and not exported, as a sentence; None where there was none."""
    if not refused:
        return None
    parts = [f"trial {row.trial} ({row.fingerprint}): {lines_text(row.over)}" for row in refused]
    return f"Refused as over the budget when measured on this device: {'; '.join(parts)}."
