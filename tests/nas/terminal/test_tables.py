"""Tables: every cell is readable at every width."""

from __future__ import annotations

import io

from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from moesaic.nas.terminal.tables import plain_table

cells = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)


def printed(width: int, *rows: tuple[str | Text, ...], columns: str = "cost|smallest|largest|budget") -> str:
    table = plain_table("Costs", columns, "cost")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@given(st.integers(8, 200), st.lists(st.tuples(cells, cells, cells, cells), min_size=1, max_size=4))
@example(80, [("active_parameters", "239.7K per token", "1.204 MFLOPs and more", "within tolerance of 3 %")])
def test_no_cell_is_cut_whatever_the_width(width, rows):
    text = "".join(Text.from_ansi(printed(width, *rows)).plain.split())
    for row in rows:
        for cell in row:
            assert cell.replace(" ", "") in text


def test_a_table_that_fits_has_a_line_per_row_and_a_narrow_one_a_line_per_cell():
    rows = [("flops", "27.52 MFLOPs", "1.2 GFLOPs", Text("inside", style="green")), ("memory", "1 MB", "3 MB", "")]
    wide, narrow = printed(80, *rows).splitlines(), printed(30, *rows).splitlines()
    assert any("27.52 MFLOPs" in line and "1.2 GFLOPs" in line for line in wide)
    assert [" ".join(line.split()) for line in narrow if line.startswith("  ")] == [
        "smallest 27.52 MFLOPs",
        "largest 1.2 GFLOPs",
        "budget inside",
        "smallest 1 MB",
        "largest 3 MB",
    ]
