"""What `--json` prints: values of the client's model as JSON documents; absent is null."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stoker.cli.text import Document, document
from stoker.core.errors import ExitCode, StokerError

if TYPE_CHECKING:  # errors are printed where gRPC was not loaded
    from stoker.client import Allocation, Nodes


def allocation(value: "Allocation") -> Document:
    """Return the document of an allocation, with its holder where one looks for it."""
    return {**document(value), "holder": value.request.holder}


def status(nodes: "Nodes", allocations: Sequence["Allocation"]) -> Document:
    """Return the document of the whole fleet."""
    return {**document(nodes), "allocations": [allocation(each) for each in allocations]}


def error(found: StokerError | str, code: ExitCode) -> Document:
    """Return what is printed instead of a result."""
    fields: Document = {
        "kind": type(found).__name__ if isinstance(found, StokerError) else code.name.title(),
        "exit_code": int(code),
        "message": str(found),
    }
    refusals = getattr(found, "refusals", None)
    if refusals is not None:
        fields |= {
            "refusals": [document(each) for each in refusals.nodes],
            "nodes_total": refusals.nodes_total,
            "ahead": refusals.ahead,
        }
    return {"error": fields}
