"""The cheapest change that would place a request now.

Theory of operation. Changes are looked at in ranks: first what the asker can do himself and loses
little by, then what an operator must do, then what takes something from others, and in the end what
costs money. Within a rank the smallest amount wins, then the name. docs/placement.md lists the
ranks; RANKS below is what they are.

The answer is that of trying each change in this order on the whole fleet. What saves the work: a
change can help only at nodes that one of the filters which it touches was the first to refuse, as
all filters before that one, and their answers, stay as they are; of amounts that only get easier
the least that does is found by halving; and of releases each node's cheapest is asked first.
"""

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from stoker.aggregator.model import Plan
from stoker.aggregator.placing import changes as asked
from stoker.aggregator.placing import fleet_changes as done
from stoker.aggregator.placing.changes import OF_GPUS, OF_HOST, Change, Situation
from stoker.aggregator.placing.filters import fits
from stoker.aggregator.placing.fleet_changes import ReleaseSet, Weight
from stoker.aggregator.placing.parts import anti_affinity_label
from stoker.aggregator.placing.place import find_place
from stoker.aggregator.placing.whatif import Release, WhatIf
from stoker.aggregator.views import FleetView, NodeView


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change, and where the request would go then."""

    change: Change
    plan: Plan


@dataclass(frozen=True, slots=True)
class Asked:
    """Changes of the request: the filters that each touches."""

    changes: Callable[[Situation], Iterable[Change]]
    mends: frozenset[str]
    is_easier: bool = False  # whether each is easier to place than that before it


@dataclass(frozen=True, slots=True)
class Done:
    """Changes of the fleet."""

    changes: Callable[[Situation, WhatIf], Iterable[Change]]


@dataclass(frozen=True, slots=True)
class Released:
    """Releases for the sake of a node that one of `done.OF_TENANTS` refuses."""


Row = Asked | Done | Released

_FEWER = OF_GPUS | OF_HOST | {"same_label"}
_PART = frozenset(("same_label",))

RANKS: tuple[tuple[Row, ...], ...] = (
    # What the asker can do, and loses little by.
    (Done(done.letting_go),),
    (Asked(asked.without_topology, frozenset(("topology_total", "topology_free"))),),
    (Asked(asked.without_same_label, _PART),),
    (Asked(asked.without_anti_affinity, frozenset(("anti_affinity",))),),
    (Asked(asked.other_host, frozenset(("host",))),),
    (Asked(asked.other_node, frozenset(("node",))),),
    (Asked(asked.fewer_labels, frozenset(("node_labels",))),),
    (Asked(asked.other_pool, frozenset(("pool",))),),
    (Asked(asked.older_driver, frozenset(("driver_version",)), is_easier=True),),
    (Asked(asked.lower_capability, OF_GPUS, is_easier=True),),
    (Asked(asked.smaller_gpus, OF_GPUS, is_easier=True),),
    (Asked(asked.larger_profile, OF_GPUS),),
    (Asked(asked.other_model, OF_GPUS),),
    (Asked(asked.fewer_cpus, OF_HOST, is_easier=True),),
    (Asked(asked.less_host_memory, OF_HOST, is_easier=True),),
    (Asked(asked.less_compute, OF_GPUS, is_easier=True),),
    (Asked(asked.less_memory, OF_GPUS, is_easier=True),),
    (Asked(asked.over_more_nodes, OF_GPUS | OF_HOST),),
    (
        Asked(asked.fewer_gpus, _FEWER, is_easier=True),
        Asked(asked.fewer_nodes, _FEWER, is_easier=True),
    ),
    # What an operator must do.
    (Done(done.uncordoned),),
    (Done(done.repartitioned),),
    (Done(done.repaired),),
    # Less than half of what was asked for.
    (
        Asked(asked.far_fewer_gpus, _FEWER, is_easier=True),
        Asked(asked.far_fewer_nodes, _FEWER, is_easier=True),
    ),
    # What takes something from others.
    (Asked(asked.higher_priority, frozenset(("queue",)), is_easier=True),),
    (Done(done.without_processes),),
    (Released(),),
    # What costs money.
    (Done(done.added),),
)


def smallest(s: Situation) -> Proposal | None:
    """Return the cheapest change that places the request now; None: none of RANKS does.

    At 12,130 nodes it takes up to about a second, most of it where a release is what helps.
    """
    fleet = WhatIf(s.view)
    for rows in RANKS:
        found = [proposal for row in rows if (proposal := _first(row, s, fleet)) is not None]
        if found:
            return min(found, key=lambda proposal: proposal.change.key)
    return None


def every(s: Situation) -> Iterator[tuple[int, Change]]:
    """Yield all changes that are looked at, each with its rank."""
    fleet = WhatIf(s.view)
    for rank, rows in enumerate(RANKS):
        for row in rows:
            match row:
                case Asked(changes):
                    yield from ((rank, change) for change in changes(s))
                case Done(changes):
                    yield from ((rank, change) for change in changes(s, fleet))
                case Released():
                    for node in s.nodes_refused_by(done.OF_TENANTS):
                        weights = done.releasable(s, fleet, node)
                        for each in done.release_sets(s, node, weights):
                            yield rank, done.released(s, node, each.ids, each.weight)


def applied(change: Change, s: Situation) -> tuple[FleetView, Mapping[str, str]]:
    """Return the fleet as it would be then, and the nodes that would be kept for those ahead."""
    view = s.view if change.supposed is None else WhatIf(s.view).suppose(change.supposed)
    priority = change.request.priority
    return view, s.keep([each for each in s.ahead if each.request.priority >= priority], view)


# --- helpers


def _first(row: Row, s: Situation, fleet: WhatIf) -> Proposal | None:
    match row:
        case Asked():
            return _first_asked(row, s)
        case Done(changes):
            ordered = sorted(changes(s, fleet), key=lambda change: change.key)
            return next((p for each in ordered if (p := _if_done(each, s, fleet))), None)
        case Released():
            return _first_release(s, fleet)


def _first_asked(row: Asked, s: Situation) -> Proposal | None:
    ordered = sorted(row.changes(s), key=lambda change: change.key)
    if not ordered:
        return None
    names = [*s.able, *(node.name for node in s.nodes_refused_by(row.mends))]
    if not names:
        return None
    scope = s.view if anti_affinity_label(s.request) is not None else _only(s.view, names)
    if not row.is_easier:
        return next((p for each in ordered if (p := _if_asked(each, s, scope))), None)
    best = _if_asked(ordered[-1], s, scope)
    if best is None:
        return None
    low, high = 0, len(ordered) - 1  # the one at `high` does
    while low < high:
        middle = (low + high) // 2
        found = _if_asked(ordered[middle], s, scope)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def _if_asked(change: Change, s: Situation, scope: FleetView) -> Proposal | None:
    blocked = s.blocked
    if change.request.priority > s.request.priority:
        blocked = applied(change, s)[1]
    plan = find_place(change.request, scope, blocked)
    return None if plan is None else Proposal(change, plan)


def _if_done(change: Change, s: Situation, fleet: WhatIf) -> Proposal | None:
    """Return the proposal if the change of the fleet places the request."""
    assert change.supposed is not None, f"nothing is done by {change}"
    request, view = change.request, fleet.suppose(change.supposed)
    names = fleet.touched(change.supposed, view)
    if _frees_a_label(change, s):
        names = [*names, *(node.name for node in s.nodes_refused_by({"anti_affinity"}))]
    # Of a gang also a node that could host a part before: it may now do so on another model.
    gained = [name for name in dict.fromkeys(names) if fits(request, view.nodes[name], view)]
    if not gained or len({*gained, *s.able}) < request.nodes:
        return None
    blocked = s.blocked
    if s.ahead and not isinstance(change.supposed, Release):
        blocked = _kept_then(s, view, gained)
    if all(name in blocked for name in gained):
        return None
    candidates = dict.fromkeys([*(s.able if request.nodes > 1 else ()), *gained])
    scope = view if anti_affinity_label(request) is not None else _only(view, candidates)
    plan = find_place(request, scope, blocked)
    return None if plan is None else Proposal(change, plan)


def _frees_a_label(change: Change, s: Situation) -> bool:
    """Whether others of the service go, whose label value is then free on other nodes as well."""
    return anti_affinity_label(change.request) is not None and _has_service(
        change.allocation_ids, s
    )


def _has_service(ids: Iterable[str], s: Situation) -> bool:
    return any(s.view.allocations[id_].request.service == s.request.service for id_ in ids)


def _kept_then(s: Situation, view: FleetView, gained: Sequence[str]) -> Mapping[str, str]:
    """Return the nodes that would be kept for those ahead: what becomes usable is for them, too."""
    if any(waiting.request.nodes > 1 for waiting in s.ahead):  # they look at all nodes together
        return s.keep(s.ahead, view)
    others = {name: id_ for name, id_ in s.blocked.items() if name not in gained}
    return {**others, **s.keep(s.ahead, _only(view, gained))}


def _first_release(s: Situation, fleet: WhatIf) -> Proposal | None:
    """Return the cheapest release that does: the node whose next one is cheapest is asked first.

    A node is looked into only once what it can cost at least is the cheapest there is.
    """
    queues: dict[str, Iterator[ReleaseSet]] = {}
    heap: list[tuple[Weight, str, tuple[str, ...]]] = []
    for node in s.nodes_refused_by(done.OF_TENANTS):
        weights = done.releasable(s, fleet, node)
        if weights and _may_help(s, node, weights):
            heap.append((done.least_weight(s.request, node, weights), node.name, ()))
    heapq.heapify(heap)
    while heap:
        weight, name, ids = heapq.heappop(heap)
        node = s.view.nodes[name]
        if ids:
            proposal = _if_done(done.released(s, node, ids, weight), s, fleet)
            if proposal is not None:
                return proposal
        else:
            weights = done.releasable(s, fleet, node)
            sets = done.release_sets(s, node, weights)
            queues[name] = iter([each for each in sets if _may_help(s, node, each.ids)])
        following = next(queues[name], None)
        if following is not None:
            heapq.heappush(heap, (following.weight, name, following.ids))
    return None


def _may_help(s: Situation, node: NodeView, ids: Collection[str]) -> bool:
    """Whether the release may do: cheap, and false only where it cannot."""
    if any(len(s.view.allocations[id_].nodes) > 1 for id_ in ids):
        return True  # it makes room elsewhere, too
    if anti_affinity_label(s.request) is not None and _has_service(ids, s):
        return True  # it frees a value of the label elsewhere, too
    if len(s.able) + 1 < s.request.nodes:
        return False
    return done.may_make_room(s.request, node, ids)


def _only(view: FleetView, names: Iterable[str]) -> FleetView:
    return replace(view, nodes={name: view.nodes[name] for name in names})
