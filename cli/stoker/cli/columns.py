"""Tables without lines that leave out what matters least where the terminal is narrow."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

GAP = 2
# Less of a sentence is hard to read; then columns go before it is folded or cut more.
_LONG_WIDTH_MIN = 30


class Columns:
    """Rows of cells under names.

    Every cell stands on one line: prose is folded where it does not fit, and what may be cut is
    cut, where a row has to be a line.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        numbers: Sequence[str] = (),
        prose: str | None = None,
        cut: str | None = None,
        dispensable: Sequence[str] = (),
    ) -> None:
        """`dispensable`: the columns that may be left out, what matters least first."""
        self._names = tuple(names)
        self._numbers = frozenset(numbers)
        self._prose = prose
        self._cut = cut
        self._dispensable = tuple(dispensable)
        self._rows: list[tuple[Text, ...]] = []

    def add(self, *cells: Text) -> None:
        """Add a row."""
        assert len(cells) == len(self._names)
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table with the columns that fit."""
        kept = self._kept(options.max_width)
        table = Table(box=None, padding=(0, GAP, 0, 0), header_style="bold", pad_edge=False)
        for name in kept:
            table.add_column(
                name,
                justify="right" if name in self._numbers else "left",
                no_wrap=name != self._prose,
                overflow="fold" if name == self._prose else "ellipsis",  # a long word is folded too
            )
        room = options.max_width - self._width([name for name in kept if name != self._cut]) - GAP
        for row in self._rows:
            table.add_row(*(self._cell(row, name, room) for name in kept))
        yield table

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return the width that it takes."""
        width = min(options.max_width, self._width(self._kept(options.max_width)))
        return Measurement(width, width)

    def _cell(self, row: tuple[Text, ...], name: str, room: int) -> Text:
        cell = row[self._names.index(name)]
        if name == self._cut:
            cell = cell.copy()
            cell.truncate(max(room, 1), overflow="ellipsis")
        return cell

    def _kept(self, width: int) -> list[str]:
        kept = list(self._names)
        for name in self._dispensable:
            if self._width(kept) <= width:
                break
            kept.remove(name)
        return kept

    def _width(self, names: Sequence[str]) -> int:
        widths: list[int] = []
        for name in names:
            place = self._names.index(name)
            longest = max((row[place].cell_len for row in self._rows), default=0)
            widest = max(len(name), longest)
            gives_way = name in (self._prose, self._cut)
            widths.append(min(widest, _LONG_WIDTH_MIN) if gives_way else widest)
        return sum(widths) + GAP * max(0, len(widths) - 1)
