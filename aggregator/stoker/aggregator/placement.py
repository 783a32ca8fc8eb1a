"""Where a request goes: the best of the nodes that fit, or why none does."""

from collections import Counter
from collections.abc import Iterable, Mapping

from stoker.aggregator.feasibility import count_free, find_room, matching_gpus, refuse
from stoker.aggregator.model import Device, Plan, Refusal, Refusals, Request
from stoker.aggregator.scoring import whole_score
from stoker.aggregator.views import FleetView, GpuView, NodeView
from stoker.core.units import format_bytes

NOTHING_BLOCKED: Mapping[str, str] = {}


def place(
    request: Request, view: FleetView, blocked: Mapping[str, str] = NOTHING_BLOCKED
) -> Plan | Refusals:
    """Return the plan for `request` on the fleet as `view` shows it, or a refusal for every node.

    `blocked` names nodes that are kept for a request which is ahead in the queue (node -> its
    allocation id). Best fit: whole GPUs go where the fewest free ones are left, a share goes to the
    GPU with the least room.
    """
    return find_place(request, view, blocked) or explain(request, view, blocked)


def find_place(
    request: Request, view: FleetView, blocked: Mapping[str, str] = NOTHING_BLOCKED
) -> Plan | None:
    """Return the plan of `place`, or None without going into the reasons."""
    if request.memory_bytes is None:
        return _place_whole(request, view, blocked)
    return _place_share(request, request.memory_bytes, view, blocked)


def explain(
    request: Request,
    view: FleetView,
    blocked: Mapping[str, str] = NOTHING_BLOCKED,
    ahead: int = 0,
) -> Refusals:
    """Return why each node does not host `request`; one that would is refused for the queue's sake.

    `ahead` is how many requests before it in the queue compete for the same nodes.
    """
    refusals: list[Refusal] = []
    for node in view.nodes.values():
        refusal = refuse(request, node, view) or _kept_for(node, blocked)
        if refusal is not None:
            refusals.append(refusal)
    return Refusals(_summary(request, refusals, len(view.nodes)), tuple(refusals), ahead)


def _place_whole(request: Request, view: FleetView, blocked: Mapping[str, str]) -> Plan | None:
    wanted, has_model = request.gpus, request.model is not None
    best: NodeView | None = None
    best_score = 0
    for name, node in _candidates(request, view):
        free = node.free_gpus
        if free < wanted:
            continue
        if has_model:
            free = count_free(request, node)
        score = whole_score(free, wanted)
        if score < 0 or (best is not None and score >= best_score):
            continue
        if name in blocked or refuse(request, node, view) is not None:
            continue
        best, best_score = node, score
        if score == 0:
            break  # nothing can be tighter
    if best is None:
        return None
    free_gpus = [gpu for gpu in matching_gpus(request, best) if gpu.is_free]
    return Plan(best.name, tuple(_whole(gpu) for gpu in free_gpus[:wanted]))


def _place_share(
    request: Request, memory_bytes: int, view: FleetView, blocked: Mapping[str, str]
) -> Plan | None:
    best: tuple[tuple[bool, int], str, GpuView] | None = None
    for name, node in _candidates(request, view):
        gpu = find_room(request, memory_bytes, node)
        if gpu is None or name in blocked:
            continue
        score = gpu.share_score
        if best is not None and score >= best[0]:
            continue
        if refuse(request, node, view) is None:
            best = (score, name, gpu)
    if best is None:
        return None
    _, name, gpu = best
    share = Device(gpu.gpu.uuid, gpu.gpu.model, gpu.gpu.index, memory_bytes, exclusive=False)
    return Plan(name, (share,))


def _candidates(request: Request, view: FleetView) -> Iterable[tuple[str, NodeView]]:
    if request.node is None:
        return view.nodes.items()
    asked = view.nodes.get(request.node)
    return () if asked is None else ((request.node, asked),)


def _whole(gpu: GpuView) -> Device:
    facts = gpu.gpu
    return Device(facts.uuid, facts.model, facts.index, facts.memory_total_bytes, exclusive=True)


def _kept_for(node: NodeView, blocked: Mapping[str, str]) -> Refusal | None:
    waiting = blocked.get(node.name)
    if waiting is None:
        return None
    reason = f"it is kept for {waiting}, which is ahead in the queue"
    return Refusal(node.name, "queue", reason, "nobody ahead", waiting)


# How a person reads each filter in a count.
FILTERS_IN_WORDS = {
    "node": "another node than asked for",
    "host": "on another host",
    "pool": "in another pool",
    "model": "wrong model",
    "gpus_total": "too few GPUs",
    "memory_total": "GPUs too small",
    "gpus_cordoned": "too few GPUs that are not cordoned",
    "cordoned": "cordoned",
    "disconnected": "disconnected",
    "driver": "driver not readable",
    "stale": "telemetry stale",
    "gpus_free": "not enough free GPUs",
    "memory_free": "not enough free GPU memory",
    "queue": "kept for a request ahead in the queue",
}


def _summary(request: Request, refusals: list[Refusal], nodes: int) -> str:
    """Return one line: `no node for 2 x GPU: 4 nodes: 3 not enough free GPUs (...), 1 cordoned`."""
    if nodes == 0:
        return f"no node for {request.described()}: the fleet has no nodes yet"
    if len(refusals) < nodes:
        return f"{nodes - len(refusals)} of {nodes} nodes can host {request.described()} now"
    if len(refusals) == 1:
        only = refusals[0]
        return f"no node for {request.described()}: {only.node}: {only.reason}"
    counts = Counter(refusal.filter for refusal in refusals)
    parts = [
        f"{count} {FILTERS_IN_WORDS[name]}{_closest(name, refusals)}"
        for name, count in counts.most_common()
    ]
    return f"no node for {request.described()}: {nodes} nodes: {', '.join(parts)}"


def _closest(name: str, refusals: list[Refusal]) -> str:
    """Return what the nearest miss of a filter had, where that is a number."""
    if name in ("gpus_free", "gpus_total"):  # not gpus_cordoned: GPUs or bytes are counted there
        best = max((r for r in refusals if r.filter == name), key=lambda r: int(r.found))
        return f" (best: {best.node} has {best.found})"
    if name in ("memory_free", "memory_total"):
        best = max((r for r in refusals if r.filter == name), key=lambda r: int(r.found))
        return f" (best: {best.node} has {format_bytes(int(best.found))})"
    if name == "cordoned":
        reasons = Counter(r.found for r in refusals if r.filter == name)
        return f" ({reasons.most_common(1)[0][0]})"
    return ""
