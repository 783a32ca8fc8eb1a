"""How many parts of a gang some nodes host together, and which label values are taken.

A gang keeps to its anti-affinity by a node label within itself too: no two of its nodes share a
value. A node without the label shares its value with none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stoker.aggregator.model import Request
from stoker.aggregator.placing.node_filters import allocation_of
from stoker.aggregator.views import FleetView, NodeView

NOTHING_TAKEN: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Parts:
    """How many parts of a gang some nodes can host together, and where its nodes would be alike."""

    count: int
    value: str = ""  # of `same_label`, where most can be; empty: it is not required


def parts_max(request: Request, nodes: Iterable[NodeView]) -> Parts:
    """Return how many of `nodes`, each of which could host one part, can do so together.

    They share one value of a required `same_label`, and keep to `anti_affinity` by a label among
    themselves. With several values of as many nodes the first by name is told.
    """
    if request.nodes > 1 and request.same_label is not None and request.same_label_required:
        by_value: dict[str, list[NodeView]] = {}
        for node in nodes:
            value = (node.node.facts.labels or {}).get(request.same_label)
            if value is not None:
                by_value.setdefault(value, []).append(node)
        counts = {value: _apart(request, among) for value, among in by_value.items()}
        best = min(counts, key=lambda value: (-counts[value], value), default="")
        return Parts(counts.get(best, 0), best)
    return Parts(_apart(request, nodes))


def anti_affinity_label(request: Request) -> str | None:
    """Return the node label whose value no two allocations of the service share; None: none."""
    if request.service is None or request.anti_affinity in (None, "gpu", "node"):
        return None
    return request.anti_affinity


def taken_values(request: Request, view: FleetView) -> Mapping[str, str]:
    """Return the values of that label that others of the service have, and who has them."""
    label, service = anti_affinity_label(request), request.service
    if label is None or service is None:
        return NOTHING_TAKEN
    taken: dict[str, str] = {}
    for node in view.nodes.values():
        if service in node.services:
            value = (node.node.facts.labels or {}).get(label)
            if value is not None and value not in taken:
                taken[value] = allocation_of(service, node, view)
    return taken


def _apart(request: Request, nodes: Iterable[NodeView]) -> int:
    label = anti_affinity_label(request)
    if label is None:
        return sum(1 for _ in nodes)
    values = [(node.node.facts.labels or {}).get(label) for node in nodes]
    return len({value for value in values if value is not None}) + values.count(None)
