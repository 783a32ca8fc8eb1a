"""Where a request goes: the best of the nodes that fit, or why none does."""

from collections.abc import Mapping

from stoker.aggregator.model import Placement, Plan, Refusal, Refusals, Request
from stoker.aggregator.placing import gangs
from stoker.aggregator.placing.devices import choose
from stoker.aggregator.placing.filters import count_free, fits, refuse
from stoker.aggregator.placing.parts import taken_values
from stoker.aggregator.placing.placer import Placer
from stoker.aggregator.placing.preferences import Tiers, has_preferences
from stoker.aggregator.placing.summary import summarise
from stoker.aggregator.views import FleetView, NodeView

NOTHING_BLOCKED: Mapping[str, str] = {}


def place(
    request: Request,
    view: FleetView,
    blocked: Mapping[str, str] = NOTHING_BLOCKED,
    placer: Placer | None = None,
) -> Plan | Refusals:
    """Return the plan for `request` on the fleet as `view` shows it, or a refusal for every node.

    `blocked` names nodes that are kept for a request which is ahead in the queue (node -> its
    allocation id).
    """
    return find_place(request, view, blocked, placer) or explain(request, view, blocked)


def find_place(
    request: Request,
    view: FleetView,
    blocked: Mapping[str, str] = NOTHING_BLOCKED,
    placer: Placer | None = None,
) -> Plan | None:
    """Return the plan of `place`, or None without going into the reasons.

    Without a placer every node is looked at, and the best fit is taken: for fleets that are but
    supposed, and to compare with.
    """
    if placer is not None:
        return placer.find(request, view, blocked)
    taken = taken_values(request, view)
    fitting = [
        node
        for name, node in view.nodes.items()
        if name not in blocked and fits(request, node, view, taken)
    ]
    fitting.sort(key=lambda node: (_left_over(request, node, view), node.name))
    if request.nodes > 1:
        return gangs.find(request, view, [node.name for node in fitting])
    if not fitting:
        return None
    best = fitting[0]
    if has_preferences(request):
        tiers = Tiers(request, view)
        best = min(fitting, key=tiers.of)  # the first of those that are equally good
    devices = choose(request, best, view)
    assert devices is not None, f"{best.name} was not refused for {request}"
    return Plan((Placement(best.name, devices),))


def explain(
    request: Request,
    view: FleetView,
    blocked: Mapping[str, str] = NOTHING_BLOCKED,
    ahead: int = 0,
) -> Refusals:
    """Return why each node does not host `request`; one that would is refused for the queue's sake.

    `ahead` is how many requests before it in the queue compete for the same nodes.
    """
    taken = taken_values(request, view)
    refusals: list[Refusal] = []
    able: list[str] = []
    for node in view.nodes.values():
        refusal = refuse(request, node, view, taken) or _kept_for(node, blocked)
        if refusal is not None:
            refusals.append(refusal)
        else:
            able.append(node.name)
    return Refusals(summarise(request, refusals, view, able), tuple(refusals), ahead)


def _left_over(request: Request, node: NodeView, view: FleetView) -> tuple[bool, int]:
    """Return how well it fits; lower is better.

    Of whole GPUs as few as can be are left free on the node. A share goes to a GPU that is shared
    already before one that would be broken up for it, and then to the one with the least room.
    """
    if request.is_whole:
        return False, count_free(request, node) - request.gpus
    devices = choose(request, node, view)
    assert devices is not None, f"{node.name} was not refused for {request}"
    gpu = next(each for each in node.gpus if each.gpu.uuid == devices[0].uuid)
    return not gpu.claims, gpu.room_bytes


def _kept_for(node: NodeView, blocked: Mapping[str, str]) -> Refusal | None:
    waiting = blocked.get(node.name)
    if waiting is None:
        return None
    reason = f"it is kept for {waiting}, which is ahead in the queue"
    return Refusal(node.name, "queue", reason, "nobody ahead", waiting)
