"""The words that say what to suppose of a fleet: `add 2 nodes 8xH100-80GB`, `remove n3`."""

import re

from stoker.client import AddNodes, RemoveNode, UncordonNode, WhatIf
from stoker.core.errors import BadInput, shown

GRAMMAR = "add [N nodes] [K x]MODEL [in pool NAME] | remove NODE | uncordon NODE"

_ADD = re.compile(
    r"(?:(?P<nodes>\d{1,9})\s+nodes?\s+(?:of\s+|with\s+)?)?"
    r"(?:(?P<gpus>\d{1,9})\s*x\s*)?"
    r"(?P<model>(?=\S*[A-Za-z])\S+?)(?:[-\s]nodes?)?"
    r"(?:\s+in\s+pool\s+(?P<pool>\S+))?",
    re.IGNORECASE | re.ASCII,
)


def parse_supposition(text: str) -> WhatIf:
    """Return the change that the words say; raises BadInput with the words that are understood.

    `2xH100` is one node with two; `-node` after the model may be said, and means nothing.
    """
    verb, _, rest = text.strip().partition(" ")
    rest = rest.strip()
    match verb.casefold():
        case "add":
            found = _ADD.fullmatch(rest)
            if found is not None:
                return AddNodes(
                    gpus=int(found["gpus"] or 1),
                    model=found["model"],
                    nodes=int(found["nodes"] or 1),
                    pool=found["pool"] or "",
                )
        case "remove" | "uncordon" if rest and " " not in rest:
            return RemoveNode(rest) if verb.casefold() == "remove" else UncordonNode(rest)
        case _:
            pass
    raise BadInput(f"--what-if: wanted {GRAMMAR}; found {shown(text)}")
