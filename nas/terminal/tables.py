"""Tables: in one style for a terminal, within 80 columns where the content allows it; and as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moesaic.nas.context import Context
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces.files import write_atomically

_PIPE_WIDTH = 120


def plain_table(title: str, columns: str, texts: str) -> Table:
    """A table with ``columns`` (names separated by ``|``); those in ``texts`` are left-aligned, the others right."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1)
    )
    left = texts.split("|")
    for name in columns.split("|"):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return table


def output_console() -> Console:
    """Standard output; wide where it is not a terminal, so that lines in a log do not wrap."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def what_costs_are_per(context: Context) -> str:
    """A line that says what each cost in a table is per."""
    parts = [f"{name} {d.per}" for name, d in DIMENSIONS.items() if name not in ("parameters", "latency", "memory")]
    batch = f"latency and activation memory per batch of {context}"
    return f"{', '.join(parts)}, {batch}; FLOPs are forward, 2 x multiply-accumulates."


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys, at least one, under a header."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
