"""Tables: in one style for a terminal, which never cut a figure whatever its width; and as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from moesaic.nas.context import Context
from moesaic.nas.units import DIMENSIONS
from moesaic.search_spaces.files import write_atomically

_PIPE_WIDTH = 120
_UNBOUNDED = 10_000
"""Columns that any table has room in."""


class PlainTable:
    """A table that cuts no cell: where the lines of its rows do not fit, it prints each row as a block, a line per
    cell."""

    def __init__(self, title: str, columns: Sequence[str], left: Collection[str]):
        self._title, self._columns, self._left = title, columns, left
        self._rows: list[tuple[str | Text, ...]] = []

    def add_row(self, *cells: str | Text) -> None:
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table()
        if Measurement.get(console, options.update_width(_UNBOUNDED), table).maximum <= options.max_width:
            yield table
        else:
            yield from self._blocks()

    def _table(self) -> Table:
        table = Table(
            title=self._title,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1),
        )
        for name in self._columns:
            table.add_column(name, justify="left" if name in self._left else "right", no_wrap=True)
        for row in self._rows:
            table.add_row(*row)
        return table

    def _blocks(self) -> Iterator[Text]:
        yield Text(self._title, style="bold")
        widest = max(map(len, self._columns))
        for first, *others in self._rows:
            yield Text.assemble(first)
            for name, cell in zip(self._columns[1:], others, strict=True):
                if len(cell):
                    yield Text.assemble(f"  {name:{widest}}  ", cell)


def plain_table(title: str, columns: str, texts: str) -> PlainTable:
    """A table with ``columns`` (names separated by ``|``); those in ``texts`` are left-aligned, the others right."""
    return PlainTable(title, columns.split("|"), texts.split("|"))


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
