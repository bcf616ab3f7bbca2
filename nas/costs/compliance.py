"""Whether a measured model keeps its budget: the tolerance, the status of each line, and the words for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from moesaic.nas.units import DIMENSIONS

TOLERANCE = 0.03
"""Share of a limit by which a measurement may exceed it and still count as kept: about the error of a predicted
latency. A model that is further over is refused where another one can be had, and flagged where not."""

Status = Literal["inside", "within tolerance", "over"]
STATUSES: tuple[Status, ...] = ("inside", "within tolerance", "over")
"""From good to bad."""

Line = Mapping[str, Any]
"""A budget line of a measured model, as ``Run.budget_lines`` makes it."""


def most_tolerated(limit: float) -> float:
    """The largest measurement that is not over ``limit``."""
    return limit * (1 + TOLERANCE)


def status_of(measured: float, limit: float) -> Status:
    if measured <= limit:
        return "inside"
    return "within tolerance" if measured <= most_tolerated(limit) else "over"


def worst_status(lines: Iterable[Line]) -> Status:
    """The status of a model: that of its worst line."""
    return max((line["status"] for line in lines), key=STATUSES.index)


def worst_excess(lines: Iterable[Line]) -> float:
    """Relative excess over the line that is exceeded most, negative inside."""
    return max(line["measured"] / line["limit"] - 1 for line in lines)


def lines_over(lines: Iterable[Line]) -> list[Line]:
    return [line for line in lines if line["status"] == "over"]


def margin_text(measured: float, limit: float) -> str:
    """Where a measured cost stands to its limit, in words."""
    share = measured / limit - 1
    if share > 1:
        return f"over {measured / limit:.3g}×"
    return f"over by {share:.1%}" if share > 0 else f"inside by {-share:.1%}"


def lines_text(lines: Iterable[Line]) -> str:
    """``latency 12.4 ms of 11 ms (over by 12.7%)`` for each line."""
    parts = []
    for line in lines:
        form = DIMENSIONS[line["name"]].format
        margin = margin_text(line["measured"], line["limit"])
        parts.append(f"{line['name']} {form(line['measured'])} of {form(line['limit'])} ({margin})")
    return ", ".join(parts)


def over_text(lines: Sequence[Line]) -> str | None:
    """What is said of a model that ships although it is over its budget; None for one that is not."""
    over = lines_over(lines)
    return f"OVER BUDGET when measured on this device: {lines_text(over)}" if over else None


def refused_text(refused: Sequence[Mapping[str, Any]]) -> str | None:
    """The candidates that were measured and not exported, as a sentence; None where there was none.

    Each is ``{trial, fingerprint, validation_loss, over}``, with the lines that it breaks.
    """
    if not refused:
        return None
    parts = [f"trial {row['trial']} ({row['fingerprint']}): {lines_text(row['over'])}" for row in refused]
    return f"Refused, being over the budget when measured on this device: {'; '.join(parts)}."
