"""Where renderables are printed: a terminal as wide as it is, else one record a line."""

import sys
from typing import TextIO

from rich.console import Console, RenderableType

# Wide enough that nothing folds where no terminal sets a width: a line is then a record.
_WIDTH_WITHOUT_TERMINAL = 10_000


def console(stream: TextIO | None = None, width: int | None = None) -> Console:
    """Return where renderables are printed, else standard output; foreign text is no markup."""
    file = sys.stdout if stream is None else stream
    wide = None if file.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(file=file, width=width or wide, markup=False, highlight=False, emoji=False)


def show(shown: RenderableType, where: Console | None = None) -> None:
    """Print, without the blanks with which tables end their lines."""
    where = where or console()
    with where.capture() as captured:
        where.print(shown, crop=False)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    where.file.write("\n".join(lines) + "\n")
    where.file.flush()


# --- the fleet
