"""How the GPUs behind an endpoint are, by what the fleet knows: may it be called, and its load."""

from collections.abc import Iterator
from dataclasses import dataclass

from stoker.aggregator.fleet import INTERVALS_FRESH, Fleet
from stoker.aggregator.model import Allocation, AllocationState, Device
from stoker.aggregator.verdicts import Verdict
from stoker.aggregator.views import driver_problem


@dataclass(frozen=True, slots=True)
class Standing:
    """What the fleet says of an endpoint."""

    over: str = ""  # why its allocation is not granted any more; empty: it is
    out: str = ""  # why it must not be called now; empty: it may be
    utilization_ratio: float | None = None  # of its busiest GPU; None: not known
    memory_used_ratio: float | None = None  # of its fullest GPU


def stand(fleet: Fleet, allocation_id: str, now: float, *, is_settled: bool) -> Standing:
    """Return how the endpoint of this allocation stands.

    Until it `is_settled`, agents may not have come back since the aggregator started: of a node
    that has not, nothing is held against an endpoint that gives signs of life itself.
    """
    allocation = fleet.allocations.get(allocation_id)
    if allocation is None:
        return Standing(over=f"allocation {allocation_id} is not known any more")
    if allocation.state is not AllocationState.GRANTED:
        why = f": {allocation.reason}" if allocation.reason else ""
        return Standing(over=f"allocation {allocation_id} is {allocation.state}{why}")
    for placement in allocation.placements:
        if out := _node_out(fleet, placement.node, now, is_settled=is_settled):
            return Standing(out=out)
        for device in placement.devices:
            if out := _gpu_out(fleet, placement.node, device):
                return Standing(out=out)
    loads = list(_loads(fleet, allocation, now))
    busy = [utilization for utilization, _ in loads if utilization is not None]
    full = [memory for _, memory in loads if memory is not None]
    return Standing(
        utilization_ratio=max(busy, default=None), memory_used_ratio=max(full, default=None)
    )


def _node_out(fleet: Fleet, name: str, now: float, *, is_settled: bool) -> str:
    """Return why nothing on the node may be called; empty: its GPUs decide."""
    node = fleet.nodes.get(name)
    if node is None:
        return f"node {name} is not known any more"
    if node.drain_at is not None:
        return f"node {name} is drained: {node.cordoned}"
    if node.cordoned is not None:
        return f"node {name} is cordoned: {node.cordoned}"
    status = fleet.status(name)
    if status.session == 0:
        if not is_settled and status.last_frame_at is None:
            return ""
        return f"node {name} is disconnected: {status.disconnected_reason}"
    fresh_until = fleet.fresh_until.get(name)
    if fresh_until is None and not is_settled:
        return ""
    if problem := driver_problem(status.driver, status.driver_reason):
        return f"node {name}: {problem}"
    if fresh_until is None:
        return f"node {name} is stale: no sample of its GPUs has arrived yet"
    if now > fresh_until:
        return f"node {name} is stale: its newest sample is older than three sampling intervals"
    return ""


def _gpu_out(fleet: Fleet, node: str, device: Device) -> str:
    """Return why nothing on the GPU may be called; empty: it is well."""
    condition = fleet.conditions.get(device.uuid)
    status = fleet.status(node)
    health = (status.health or {}).get(device.uuid) or (condition.health if condition else None)
    if health is not None and health.verdict is Verdict.UNHEALTHY:
        return f"GPU {device.index} of node {node} is unhealthy: {health.reason}"
    cordon = condition.cordon if condition else None
    if cordon is not None:
        verb = "cordoned" if cordon.drain_at is None else "drained"
        return f"GPU {device.index} of node {node} is {verb}: {cordon.reason}"
    for missing in status.missing:
        if missing.uuid == device.uuid:
            return f"GPU {device.index} of node {node} is out: {missing.reason}"
    return ""


def _loads(
    fleet: Fleet, allocation: Allocation, now: float
) -> Iterator[tuple[float | None, float | None]]:
    """Yield utilization and part of the memory in use of each of its GPUs, where fresh."""
    for placement in allocation.placements:
        node = fleet.nodes.get(placement.node)
        if node is None:
            continue
        gpus = node.facts.gpus
        oldest = now - INTERVALS_FRESH * node.facts.interval_seconds
        samples = fleet.status(placement.node).samples or {}
        for device in placement.devices:
            sample = samples.get(device.uuid)
            if sample is None or sample.at < oldest:
                continue
            memory, used = None, sample.memory_used_bytes
            total = next((gpu.memory_total_bytes for gpu in gpus if gpu.uuid == device.uuid), 0)
            if total and used is not None:
                memory = min(1.0, used / total)
            yield sample.utilization_ratio, memory
