"""What several tables say: foreign words made harmless, counts, a GPU's verdict."""

from collections.abc import Mapping

from rich.text import Text

from stoker.cli.text import one_line
from stoker.core.units import format_duration

ABSENT = "-"

# The protocol's names; one that is not here is of a newer daemon, and shown as it came.
ACTIONS: Mapping[str, str] = {
    "none": "",
    "restart_app": "restart app",
    "drain": "drain",
    "reset_gpu": "reset GPU",
    "reboot": "reboot",
    "rma": "RMA",
    "unknown": "unknown action",
}
_VERDICT_STYLES: Mapping[str, str] = {
    "healthy": "green",
    "degraded": "yellow",
    "unhealthy": "red",
    "unknown": "yellow",
}


def words(value: str, style: str = "") -> Text:
    """Return a text on one line, of which nothing is a command to the terminal or markup."""
    return Text(one_line(value), style=style)


def counted(count: int, noun: str) -> str:
    """Return "1 GPU", "2 GPUs"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def ago(at: float | None, now: float, absent: str = ABSENT) -> str:
    """Return how long ago a moment was, in Unix seconds both."""
    if at is None:
        return absent
    return f"{format_duration(now - at)} ago" if now - at >= 1 else "now"


def verdict(found: str | None) -> Text:
    """Return a verdict in its colour; None: nobody has judged."""
    return words(found or ABSENT, _VERDICT_STYLES.get(found or "", ""))


def action(found: str) -> str:
    """Return what mends it in the words of people; empty: nothing is to be done."""
    return ACTIONS.get(found, found)


def verdict_and_action(found: str | None, mends: str) -> Text:
    """Return both in one cell: "unhealthy: reset GPU"."""
    shown = verdict(found)
    if done := action(mends):
        shown.append_text(words(f": {done}"))
    return shown
