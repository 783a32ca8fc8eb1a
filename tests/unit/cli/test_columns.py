"""Requirements on tables: what is folded, what is cut, what goes first where it is narrow."""

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from stoker.cli import screen
from stoker.cli.columns import Columns

letters = st.text("abc", max_size=60)


def lines_of(table: Columns, width: int) -> list[str]:
    stream = io.StringIO()
    screen.show(table, screen.console(stream, width))
    return stream.getvalue().splitlines()


@given(st.lists(letters, min_size=1, max_size=4), st.integers(50, 120))
def test_what_may_be_cut_never_takes_a_second_line(cells: list[str], width: int) -> None:
    table = Columns(("ID", "WHAT", "MORE"), cut="WHAT", dispensable=("MORE",))
    for number, cell in enumerate(cells):
        table.add(Text(f"row-{number}"), Text(cell), Text("m" * 10))
    head, *rows = lines_of(table, width)
    assert head.startswith("ID     WHAT")
    assert len(rows) == len(cells)
    for number, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        assert len(row) <= width
        name, *rest = row.split()
        assert name == f"row-{number}"
        shown = rest[0] if cell else ""
        assert shown == cell or (shown.endswith("…") and cell.startswith(shown[:-1]))


def test_what_fits_is_not_cut() -> None:
    table = Columns(("ID", "WHAT"), cut="WHAT")
    table.add(Text("1"), Text("b" * 36))
    assert lines_of(table, 40)[1] == f"1   {'b' * 36}"
    assert lines_of(table, 39)[1] == f"1   {'b' * 34}…"


@given(letters, st.integers(40, 120))
def test_prose_is_folded_and_whole(cell: str, width: int) -> None:
    table = Columns(("ID", "WHAT"), prose="WHAT")
    table.add(Text("1"), Text(cell))
    _, *rows = lines_of(table, width)
    assert "".join(row[4:] for row in rows) == cell
    assert all(len(row) <= width for row in rows)
