"""Fleets in which something had better move: allocations put where a test wants them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tests.unit.aggregator.builders import Scene, share, whole

from stoker.aggregator import events as e
from stoker.aggregator.model import Allocation, Device, GpuSample, Placement, Request
from stoker.aggregator.moves import MovePlan, MovePolicy
from stoker.aggregator.rebalancing import plan_moves
from stoker.aggregator.views import FleetView


def placed(view: FleetView, request: Request, node: str, gpus: Sequence[int]) -> Placement:
    """What the request takes of these GPUs, by number."""
    devices: list[Device] = []
    for index in gpus:
        facts = view.nodes[node].gpus[index].gpu
        total = facts.memory_total_bytes
        part = request.share_bytes(total) if request.is_share else total
        compute = request.compute_milli if request.is_share else None
        exclusive = not request.is_share
        devices.append(Device(facts.uuid, facts.model, index, part, exclusive, compute))
    return Placement(node, tuple(devices))


def hold(scene: Scene, request: Request, node: str, *gpus: int, more: str = "") -> Allocation:
    """The request is granted these GPUs, of a gang also those of another node.

    Whatever placement would say to it.
    """
    placements = tuple(placed(scene.view(), request, name, gpus) for name in (node, more) if name)
    id_ = scene.new_id()
    scene.record(e.AllocationGranted(scene.now, id_, request, "", scene.now, placements))
    return scene.fleet.allocations[id_]


def end(scene: Scene, allocation: Allocation) -> None:
    """It is released, and its nodes have let go."""
    scene.record(
        e.AllocationReleasing(scene.now, allocation.id, "released"),
        e.AllocationEnded(scene.now, allocation.id, "released"),
    )


def wish_before(scene: Scene, request: Request, times: int = 1) -> None:
    """The fleet was asked for this before; nobody waits for it any more."""
    for _ in range(times):
        id_ = scene.new_id()
        scene.record(
            e.AllocationRequested(scene.now, id_, request, "", scene.now),
            e.AllocationEnded(scene.now, id_, "cancelled"),
        )


def warm(scene: Scene, busy: Mapping[str, float], used: Mapping[str, float] | None = None) -> None:
    """Long after every grant the nodes tell how busy their GPUs are, and how full (ratios)."""
    scene.later(1000.0)
    for name, node in scene.fleet.nodes.items():
        samples = {
            gpu.uuid: GpuSample(
                memory_used_bytes=int((used or {}).get(gpu.uuid, 0.0) * gpu.memory_total_bytes),
                memory_reserved_bytes=0,
                utilization_ratio=busy.get(gpu.uuid, 0.0),
            )
            for gpu in node.facts.gpus
        }
        scene.report(name, samples=samples)


def mover(gpus: int = 1, **fields: Any) -> Request:
    return whole(gpus, movable=True, **fields)


def sharer(gib: float, **fields: Any) -> Request:
    return share(gib, movable=True, **fields)


def plan(
    scene: Scene,
    moves_max: int = 10,
    policy: MovePolicy | None = None,
    pool: str | None = None,
    skip: Sequence[str] = (),
) -> MovePlan:
    return plan_moves(scene.view(), moves_max, policy, pool, skip)


def where(moves: MovePlan) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Which allocation goes to which node and GPUs."""
    return {
        each.allocation_id: [
            (to.node, tuple(device.index for device in to.devices)) for to in each.to_placements
        ]
        for each in moves.moves
    }
