"""Which nodes a gang goes to: all of them at once, or none.

Theory of operation. Every candidate can host one part; what is left is what the parts ask of each
other. Their GPUs are of one model. With `same_label` required, all are on one value of that label.
With an anti-affinity to a node label no two are on the same value of it; a node without that label
shares its value with none. Both come down to counting: within one model and one value of
`same_label` a gang fits if the values of the other label, each counted once, and the nodes without
it are as many as the gang's nodes (its slots). So nothing that exists is missed, and whatever goes
first, the rest can still be found.

Of the values of `same_label` with enough slots, those that meet the request's preferences best come
first, and among them that with the fewest slots, so that large ones stay for larger gangs. Where
none has enough and one value is but preferred, the fewest values are taken together. Within a value
nodes go in the tiers of the preferences, then in the order in which the candidates come; with a
`spread` over a node label, always one on the value that has fewest of the same service by then.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stoker.aggregator.model import Placement, Plan, Request
from stoker.aggregator.placing.devices import choose
from stoker.aggregator.placing.parts import anti_affinity_label
from stoker.aggregator.placing.preferences import Tier, Tiers
from stoker.aggregator.views import FleetView, NodeView


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A node that can host a part."""

    node: NodeView
    rank: int  # in the policy's order; the least is best
    tier: Tier  # without the crowd on the value of the label to spread over
    together: str | None  # the value of `same_label`; None: the node has none, or nobody asks
    apart: str | None  # the value that no two may share; None: likewise
    crowd: str | None  # the value to spread over; None: likewise


@dataclass(frozen=True, slots=True)
class _Gang:
    members: tuple[_Candidate, ...]
    values: int  # of `same_label`
    tier: Tier  # sums over the members
    rank: int  # likewise


def find(request: Request, view: FleetView, candidates: Sequence[str]) -> Plan | None:
    """Return where the gang goes; None: nowhere now.

    `candidates` are the nodes that can host one part each, those that the policy likes best first.
    """
    plan = _find(request, view, candidates)
    if plan is not None and len({device.uuid for device in plan.devices}) < len(plan.devices):
        # A GPU is listed under two nodes: one of them is its host's former name.
        return _find(request, view, _without_twice_listed(view, candidates))
    return plan


def _find(request: Request, view: FleetView, candidates: Sequence[str]) -> Plan | None:
    tiers = Tiers(request, view)
    best: tuple[tuple[int, Tier, int, str], _Gang] | None = None
    for model, able in _by_model(request, view, candidates, tiers).items():
        gang = _of_one_model(request, able, tiers)
        if gang is not None:
            # A policy likes some models better than others, so its order goes before best fit.
            key = (gang.values, gang.tier, gang.rank, model)
            best = (key, gang) if best is None or key < best[0] else best
    if best is None:
        return None
    (_, _, _, model), gang = best
    placements: list[Placement] = []
    # Parts that follow each other lie together.
    for each in sorted(gang.members, key=lambda each: (each.together or "", each.node.name)):
        devices = choose(request, each.node, view, model=model or None)
        assert devices is not None, f"{each.node.name} was a candidate for {request}"
        placements.append(Placement(each.node.name, devices))
    return Plan(tuple(placements))


def _by_model(
    request: Request, view: FleetView, candidates: Sequence[str], tiers: Tiers
) -> dict[str, list[_Candidate]]:
    """Return by GPU model who can host a part on it, in order; of a gang without GPUs by ""."""
    found: dict[str, list[_Candidate]] = {}
    for rank, name in enumerate(candidates):
        node = view.nodes[name]
        labels = node.node.facts.labels or {}
        together, apart = request.same_label, anti_affinity_label(request)
        candidate = _Candidate(
            node,
            rank,
            tiers.fixed(node),
            together=labels.get(together) if together is not None else None,
            apart=labels.get(apart) if apart is not None else None,
            crowd=labels.get(tiers.label) if tiers.label is not None else None,
        )
        for model in _models(request, node, view):
            found.setdefault(model, []).append(candidate)
    return found


def _models(request: Request, node: NodeView, view: FleetView) -> Iterable[str]:
    if request.gpus == 0:
        return ("",)
    enough = [model for model, free in node.free_by_model.items() if free >= request.gpus]
    if len(enough) == 1:
        return enough  # a candidate has one that will do
    return [model for model in enough if choose(request, node, view, model=model) is not None]


def _of_one_model(request: Request, able: list[_Candidate], tiers: Tiers) -> _Gang | None:
    """Return the best gang among these candidates."""
    if request.same_label is None:
        return _gang(request, able, tiers, 1)
    by_value: dict[str, list[_Candidate]] = {}
    for each in able:
        if each.together is not None:
            by_value.setdefault(each.together, []).append(each)
    slots = {value: _slots(members) for value, members in by_value.items()}
    best: tuple[tuple[Tier, int, int, str], _Gang] | None = None
    for value, members in by_value.items():
        if slots[value] >= request.nodes:
            gang = _gang(request, members, tiers, 1)
            assert gang is not None, f"{slots[value]} slots with {request.same_label}={value}"
            key = (gang.tier, slots[value], gang.rank, value)
            best = (key, gang) if best is None or key < best[0] else best
    if best is not None:
        return best[1]
    if request.same_label_required:
        return None
    largest_first = sorted(by_value, key=lambda value: (-slots[value], value))
    groups = [by_value[value] for value in largest_first]
    groups += [[each] for each in able if each.together is None]
    merged: list[_Candidate] = []
    for count, group in enumerate(groups, 1):
        merged += group
        if _slots(merged) >= request.nodes:
            return _gang(request, merged, tiers, count)
    return None


def _slots(members: Iterable[_Candidate]) -> int:
    """Return how many of them can be in one gang."""
    values = [each.apart for each in members]
    return len(set(values) - {None}) + values.count(None)


def _gang(request: Request, able: list[_Candidate], tiers: Tiers, values: int) -> _Gang | None:
    """Return the best of these for a gang; None: they have too few slots.

    Whoever is taken first, as many are found in the end: those of which no two share a value make
    a matroid. To take one changes only how crowded its own value of the label to spread over is,
    so that a heap has the best one of each.
    """
    queues: dict[str | None, list[_Candidate]] = {}
    for each in sorted(able, key=lambda each: (each.tier, each.rank), reverse=True):
        queues.setdefault(each.crowd, []).append(each)
    heap: list[tuple[Tier, Tier, int, str | None]] = []
    for value, queue in queues.items():
        heap.append((queue[-1].tier, tiers.crowd(value), queue[-1].rank, value))
    heapq.heapify(heap)
    members: list[_Candidate] = []
    met: list[Tier] = []
    used: set[str | None] = set()
    here: dict[str | None, int] = {}
    while heap and len(members) < request.nodes:
        tier, crowd, _, value = heapq.heappop(heap)
        queue = queues[value]
        each = queue.pop()
        if each.apart is None or each.apart not in used:
            members.append(each)
            met.append((*tier, *crowd))
            used.add(each.apart)
            here[value] = here.get(value, 0) + max(1, request.gpus)
        if queue:
            after = tiers.crowd(value, here.get(value, 0))
            heapq.heappush(heap, (queue[-1].tier, after, queue[-1].rank, value))
    if len(members) < request.nodes:
        return None
    tier = tuple(sum(part) for part in zip(*met, strict=True))
    return _Gang(tuple(members), values, tier, sum(each.rank for each in members))


def _without_twice_listed(view: FleetView, candidates: Sequence[str]) -> list[str]:
    """Return the candidates without those that list a GPU which one before them lists."""
    listed: set[str] = set()
    left: list[str] = []
    for name in candidates:
        uuids = {gpu.gpu.uuid for gpu in view.nodes[name].gpus}
        if listed.isdisjoint(uuids):
            left.append(name)
            listed |= uuids
    return left
