"""Text for people and programs: lines that foreign words cannot disturb, JSON, errors."""

import json
from typing import TYPE_CHECKING, Any

import msgspec

from stoker.core.errors import ExitCode, StokerError
from stoker.core.local import NoAgent

if TYPE_CHECKING:
    from stoker.client import Refusals

REFUSALS_SHOWN_MAX = 20

Document = dict[str, Any]


def document(value: object) -> Document:
    """Return a value of the client's model as JSON knows it; its names are the protocol's."""
    found: Document = msgspec.to_builtins(value)
    return found


def as_json(found: Any) -> str:
    """Return a document as text that people can read too."""
    return json.dumps(found, indent=2, ensure_ascii=False)


def one_line(text: str) -> str:
    """Return the text on one line; what is not printable is escaped: it may come from anybody."""
    return "".join(each if each.isprintable() else _escaped(each) for each in text)


def _escaped(sign: str) -> str:
    return " " if sign in "\n\t" else sign.encode("unicode_escape", "surrogatepass").decode()


def error_lines(error: StokerError | str) -> list[str]:
    """Return what a person is told: one line, and after a refusal one for each node."""
    hint = ""
    is_local = isinstance(error, NoAgent)
    if isinstance(error, StokerError) and error.exit_code is ExitCode.UNREACHABLE and not is_local:
        hint = " (`stoker up` starts one on this machine; --address names another)"
    lines = [f"stoker: {one_line(str(error))}{hint}"]
    refusals = getattr(error, "refusals", None)
    # The summary of a fleet of one is that node's reason.
    if refusals is not None and refusals.nodes_total > 1:
        lines += refusal_lines(refusals)
    return lines


def refusal_lines(refusals: "Refusals") -> list[str]:
    """Return one line for each node that refused, the first ones of many."""
    shown = refusals.nodes[:REFUSALS_SHOWN_MAX]
    lines = [f"  {one_line(each.node)}: {one_line(each.reason)}" for each in shown]
    more = refusals.nodes_total - len(shown)
    return [*lines, f"  and {more} more nodes (--json lists them)"] if more > 0 else lines
