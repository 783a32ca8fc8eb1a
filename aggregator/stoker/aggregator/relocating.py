"""Where an allocation could go instead of where it is, while it is still held there.

A `Spot` is a place that the allocation could be granted now: every filter of placement lets it go
there, and the preferences of its request are met no worse than where it is. Its loss is what the
fleet loses in usable capacity by it. The work is bounded: of the nodes that could take it, the
fullest NODES_TRIED_MAX are looked at.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from stoker.aggregator import hotspots
from stoker.aggregator.board import Board
from stoker.aggregator.model import Allocation, Placement, Request
from stoker.aggregator.placing.devices import choose, gpus_for_part
from stoker.aggregator.placing.filters import refuse
from stoker.aggregator.placing.place import find_place
from stoker.aggregator.placing.preferences import has_preferences, tier
from stoker.aggregator.usable import Usable
from stoker.aggregator.views import FleetView, GpuView, NodeView

# Least is lost on full nodes; of a large fleet many are equally full.
NODES_TRIED_MAX = 16

Off = frozenset[str]  # names of nodes and UUIDs of GPUs where an allocation shall not go
Accepts = Callable[[NodeView, GpuView], bool]

_COPY_SUFFIX = "+"  # of the id under which a board has what was moved; no real id has it


@dataclass(frozen=True, slots=True)
class Spot:
    """A place for an allocation, and the usable capacity that is lost by taking it."""

    placements: tuple[Placement, ...]
    loss_milli: float


def anywhere(_node: NodeView, _gpu: GpuView) -> bool:
    """Accept every GPU."""
    return True


def spots(
    allocation: Allocation, board: Board, usable: Usable, off: Off, accepts: Accepts = anywhere
) -> list[Spot]:
    """Return where a granted allocation could go beside where it is, the least loss first.

    `accepts` is asked about GPUs of which it would take a share.
    """
    request = allocation.request
    if request.nodes > 1 or not (request.is_share or request.is_whole):
        plan = find_place(request, board.view, dict.fromkeys(off, allocation.id))
        found = [] if plan is None else [plan.placements]
    elif request.is_share:
        found = [(one,) for one in _shares(request, board, off, accepts)]
    else:
        found = [(one,) for one in _wholes(request, board, off)]
    # A place is worth what it is once the old one is given back, which may be on the same node.
    without = board.trial()
    without.take(allocation.id)
    if found and has_preferences(request):
        found = _no_worse(allocation, found, without.view)
    losses = _Losses(allocation, without, usable)
    measured = [Spot(each, losses.of(each)) for each in found]
    return sorted(measured, key=lambda spot: spot.loss_milli)  # equal ones stay in their order


def move(allocation: Allocation, placements: tuple[Placement, ...], board: Board) -> Allocation:
    """Move it on the board, the new place taken before the old one is given back.

    Returns it as it is there then, under another id.
    """
    moved = _copy(allocation, board.view.now)
    board.put(moved, placements)
    board.take(allocation.id)
    return moved


def may_go(allocation: Allocation, placements: tuple[Placement, ...], view: FleetView) -> bool:
    """Whether every filter lets the allocation go to these nodes; not whether to these GPUs."""
    nodes = [view.nodes.get(placement.node) for placement in placements]
    return all(
        node is not None and refuse(allocation.request, node, view) is None for node in nodes
    )


def stays_below(
    limit_milli: int, allocation: Allocation, view: FleetView, before_max_milli: int | None = None
) -> Accepts:
    """Return whether a GPU that the allocation would share is less hot than the limit with it.

    One whose heat is not known will do, unless it must have been below `before_max_milli` before.
    """
    if not allocation.request.is_share:
        return anywhere
    brought = _brought(allocation, view)

    def accepts(node: NodeView, gpu: GpuView) -> bool:
        heat = hotspots.expected(node, gpu, view)
        if heat is None:
            return before_max_milli is None
        if before_max_milli is not None and heat.milli > before_max_milli:
            return False
        return (heat + brought).milli < limit_milli

    return accepts


def only(node: NodeView, uuids: Collection[str]) -> NodeView:
    """Return the node as if it had these GPUs alone, for choosing among them."""
    return replace(node, gpus=tuple(gpu for gpu in node.gpus if gpu.gpu.uuid in uuids))


def _wholes(request: Request, board: Board, off: Off) -> Iterator[Placement]:
    """Yield one placement for each node, the nodes with fewest free GPUs first."""
    view = board.view
    nodes = (
        node
        for node in board.fullest(for_shares=False)
        if node.free_gpus >= request.gpus and node.name not in off
    )
    for node in _fitting(request, nodes, view):
        open_to_it = [gpu.gpu.uuid for gpu in node.gpus if gpu.gpu.uuid not in off]
        devices = choose(request, only(node, open_to_it), view)
        if devices is not None:
            yield Placement(node.name, devices)


def _shares(request: Request, board: Board, off: Off, accepts: Accepts) -> Iterator[Placement]:
    """Yield a placement for each GPU that could give the share, and differs from those before."""
    # Those with a GPU that is shared already come before those where a whole one would be broken.
    view = board.view
    nodes = (node for node in board.fullest(for_shares=True) if node.name not in off)
    for node in _fitting(request, nodes, view):
        seen: set[tuple[object, ...]] = set()
        for gpu in gpus_for_part(request, node):
            facts = gpu.gpu
            alike = (facts.model, gpu.room_bytes, gpu.compute_free_milli, gpu.is_free)
            if facts.uuid in off or not accepts(node, gpu) or (gpu.is_free and alike in seen):
                continue
            seen.add(alike)
            devices = choose(request, only(node, (facts.uuid,)), view)
            if devices is not None:
                yield Placement(node.name, devices)


def _fitting(request: Request, nodes: Iterator[NodeView], view: FleetView) -> Iterator[NodeView]:
    found = 0
    for node in nodes:
        if found >= NODES_TRIED_MAX:
            return
        if refuse(request, node, view) is None:
            found += 1
            yield node


def _no_worse(
    allocation: Allocation, found: list[tuple[Placement, ...]], without: FleetView
) -> list[tuple[Placement, ...]]:
    """Return those places where its preferences are met as well as where it is, or better."""
    request = allocation.request

    def tiers(placements: tuple[Placement, ...]) -> list[tuple[int, ...]]:
        met: list[tuple[int, ...]] = []
        for placement in placements:
            uuids = {device.uuid for device in placement.devices}
            met.append(tier(request, only(without.nodes[placement.node], uuids), without))
        return sorted(met)

    now = tiers(allocation.placements)
    return [each for each in found if tiers(each) <= now]


class _Losses:
    """What the places lose that one allocation could go to; nodes before it are measured once."""

    def __init__(self, allocation: Allocation, without: Board, usable: Usable) -> None:
        self._copy = _copy(allocation, without.view.now)
        self._without = without
        self._usable = usable
        self._before: dict[str, float] = {}

    def of(self, placements: tuple[Placement, ...]) -> float:
        view, after = self._without.view, self._without.trial()
        after.put(self._copy, placements)
        loss = 0.0
        for name in (placement.node for placement in placements):
            if name not in self._before:
                self._before[name] = self._usable.milli(view.nodes[name], view)
            loss += self._before[name] - self._usable.milli(after.view.nodes[name], after.view)
        return loss


def _copy(allocation: Allocation, now: float) -> Allocation:
    return replace(allocation, id=allocation.id + _COPY_SUFFIX, granted_at=now)


def _brought(allocation: Allocation, view: FleetView) -> hotspots.Heat:
    """Return the heat that comes with a share: as measured, or else as promised."""
    node = view.nodes[allocation.node]
    uuid = allocation.devices[0].uuid
    gpu = next(each for each in node.gpus if each.gpu.uuid == uuid)
    claim = next(each for each in gpu.claims if each.allocation_id == allocation.id)
    measured = hotspots.brought_by(allocation.id, node, gpu, view)
    return hotspots.promised(claim, gpu) if measured is None else measured
