"""A plan of moves as a table for people. Nothing here prints."""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text

from stoker.cli.columns import Columns
from stoker.cli.wording import counted, words
from stoker.client import MovePlan, Placement


def plan(found: MovePlan, *, is_applied: bool) -> RenderableType:
    """Return the moves in their order, with what each costs and gains in GPUs' worth."""
    headline = words(found.summary)
    if not found.moves:
        return headline
    names = ["MOVE", "ALLOCATION", "FROM", "TO", "KIND", "COST", "GAIN", "ASKED", "WHY"]
    if not is_applied:
        names.remove("ASKED")
    table = Columns(
        names,
        numbers=("MOVE", "COST", "GAIN"),
        prose="WHY",
        dispensable=("MOVE", "KIND", "COST", "GAIN", "FROM", "ASKED"),
    )
    for number, move in enumerate(found.moves, 1):
        row = {
            "MOVE": str(number),
            "ALLOCATION": move.allocation_id,
            "FROM": _places(move.from_placements),
            "TO": _places(move.to_placements),
            "KIND": move.kind,
            "COST": _worth(move.cost_milli),
            "GAIN": _worth(move.gain_milli),
            "ASKED": "yes" if move.offer_id else "no",
            "WHY": move.reason,
        }
        table.add(*(words(row[name]) for name in names))
    return Group(headline, "", table, "", _afterword(found, is_applied=is_applied))


def _afterword(found: MovePlan, *, is_applied: bool) -> Text:
    if not is_applied:
        return words("nothing was changed: --apply asks the holders")
    asked = sum(bool(move.offer_id) for move in found.moves)
    return words(f"{counted(asked, 'holder')} asked; each answers with its next keep-alives")


def _places(placements: Iterable[Placement]) -> str:
    """Return `n1: GPU 0, 3` for each node."""
    shown: list[str] = []
    for each in placements:
        devices = [
            f"{device.index} ({device.mig_profile})" if device.mig_profile else str(device.index)
            for device in each.devices
        ]
        shown.append(f"{each.node}: GPU {', '.join(devices)}" if devices else each.node)
    return "; ".join(shown)


def _worth(milli: int) -> str:
    return f"{milli / 1000:.2f}"
