"""Colours that mean the same in every picture of a report: Okabe and Ito's palette, safe for colour blindness."""

from __future__ import annotations

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ee"

EXPERT, SHARED, USED = "#56b4e9", "#e69f00", "#1f2933"

KINDS = {
    "refused": "#b0b7c0",
    "evaluated": "#9aa5b1",
    "over": "#52606d",
    "front": "#0072b2",
    "exported": "#0072b2",
    "best": "#d55e00",
}
"""Trials of a search by outcome."""

PARTS = {
    "projections": "#009e73",
    "attention": "#0072b2",
    "router": "#d55e00",
    "experts": EXPERT,
    "shared": SHARED,
    "vocabulary": "#c3cad3",
}
"""Parts of a network's compute, in the order they are stacked."""

RIVALS = ("#009e73", "#cc79a7", "#0072b2", "#e69f00")
"""Rivals of the searched model, in their order; the colours repeat after four."""

MODELS = (KINDS["best"], *RIVALS)
"""The searched model and its rivals."""
