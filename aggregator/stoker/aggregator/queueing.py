"""Who goes first: the waiting requests in order, and the nodes kept for those ahead.

A request that waits keeps every node that could ever host it, so that nothing behind it in the
queue, and no newcomer, takes what it waits for; requests that compete for nothing (another model,
pool or node) pass each other.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from operator import attrgetter

from stoker.aggregator.model import Allocation, Request
from stoker.aggregator.placing.filters import could_ever_fit
from stoker.aggregator.placing.parts import parts_max
from stoker.aggregator.views import FleetView, NodeView

# What two requests have in common that could go to the same nodes, now and ever: every field but
# those below.
Shape = tuple[object, ...]

# Fields of a request that decide about no node. What it prefers decides which of several nodes.
INDIFFERENT = frozenset(
    (
        *("holder", "ttl_seconds", "labels", "priority", "duration_seconds", "movable"),
        *("spread", "near_service", "preferred_gpu_uuid"),
    )
)
_NAMES = [f.name for f in fields(Request) if f.name not in {*INDIFFERENT, "node_labels"}]
_deciding: Callable[[Request], Shape] = attrgetter(*_NAMES)

# Shapes of request that are remembered with their nodes; beyond that all are worked out again.
_SHAPES_MAX = 256


def shape_of(request: Request) -> Shape:
    """Return what two requests have in common that the same nodes refuse for the same reasons."""
    labels = request.node_labels
    return (*_deciding(request), tuple(sorted(labels.items())) if labels else ())


class Hosts:
    """Which nodes could ever host a request, worked out once per shape and per state of the fleet.

    Worth keeping from one round to the next: nodes are registered seldom.
    """

    def __init__(self) -> None:
        self._version: int | None = None
        self._nodes_of: dict[Shape, frozenset[str]] = {}

    def of(self, request: Request, view: FleetView) -> frozenset[str]:
        """Return the nodes that would host `request` once they were free, fresh and uncordoned."""
        if self._version != view.hosts_version or len(self._nodes_of) >= _SHAPES_MAX:
            self._version = view.hosts_version
            self._nodes_of.clear()
        shape = shape_of(request)
        nodes = self._nodes_of.get(shape)
        if nodes is None:
            nodes = self._nodes_of[shape] = _ever_hosts(request, view)
        return nodes


class Kept:
    """The nodes kept for the waiting requests that were named so far."""

    def __init__(self, view: FleetView, hosts: Hosts | None = None) -> None:
        self._view = view
        self._hosts = hosts or Hosts()
        self._waiting: Counter[Shape] = Counter()
        self._nodes_of: dict[Shape, frozenset[str]] = {}
        self.nodes: dict[str, str] = {}  # node -> the first allocation that it is kept for

    def keep_for(self, waiting: Allocation) -> None:
        """Keep every node that could ever host `waiting`."""
        shape = shape_of(waiting.request)
        self._waiting[shape] += 1
        if shape not in self._nodes_of:  # otherwise all are kept already
            self._nodes_of[shape] = self._hosts.of(waiting.request, self._view)
            for name in self._nodes_of[shape]:
                self.nodes.setdefault(name, waiting.id)

    def leaves_nothing_for(self, request: Request) -> bool:
        """Whether one of the same shape waits, so that every node it could go to is kept."""
        return shape_of(request) in self._nodes_of

    def ahead_of(self, request: Request) -> int:
        """Return how many of those waiting compete with `request` for a node."""
        nodes = self._hosts.of(request, self._view)
        return sum(
            count
            for shape, count in self._waiting.items()
            if not nodes.isdisjoint(self._nodes_of[shape])
        )


def kept_ahead_of(
    priority: int,
    queue: Iterable[Allocation],
    view: FleetView,
    until: str | None = None,
    hosts: Hosts | None = None,
) -> Kept:
    """Return the nodes kept for those in `queue` that go before a newcomer of `priority`.

    With `until` the queue is read up to that allocation: what is ahead of it.
    """
    kept = Kept(view, hosts)
    for waiting in queue:
        if waiting.id == until or waiting.request.priority < priority:
            break
        kept.keep_for(waiting)
    return kept


def _ever_hosts(request: Request, view: FleetView) -> frozenset[str]:
    """Return the nodes that would host (a part of) the request once they were free.

    A gang that the fleet could never host has none, though single nodes could take a part.
    """
    able = [node for node in view.nodes.values() if could_ever_fit(request, node, view)]
    if request.nodes > 1:
        able = _for_gang(request, able, view)
    return frozenset(node.name for node in able)


def _for_gang(request: Request, able: list[NodeView], view: FleetView) -> list[NodeView]:
    if request.gpus == 0:
        return able if parts_max(request, able).count >= request.nodes else []
    models = {model for node in able for model in node.free_by_model}
    hosts: dict[str, NodeView] = {}
    for model in models:  # all GPUs of one allocation are of one
        of_model = replace(request, models=(model,))
        alike = [node for node in able if could_ever_fit(of_model, node, view)]
        if parts_max(request, alike).count >= request.nodes:
            hosts.update((node.name, node) for node in alike)
    return list(hosts.values())


def kept_for(
    waiting: Iterable[Allocation], view: FleetView, hosts: Hosts | None = None
) -> dict[str, str]:
    """Return the nodes kept for these, in their order: node -> the first it is kept for."""
    kept = Kept(view, hosts)
    for each in waiting:
        kept.keep_for(each)
    return kept.nodes
