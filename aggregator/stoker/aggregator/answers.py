"""The fleet's objects as messages, as they stand at this instant."""

from collections.abc import Iterator
from dataclasses import dataclass

from stoker.aggregator.fleet import Fleet
from stoker.aggregator.ledger import Change
from stoker.aggregator.model import Allocation, AllocationState, Claim, Node, NodeStatus
from stoker.aggregator.verdicts import Condition
from stoker.aggregator.wire_allocations import allocation_message
from stoker.aggregator.wire_fleet import node_message
from stoker.v1 import fleet_pb2, types_pb2


@dataclass(frozen=True, slots=True)
class NodeRow:
    """What a message about a node is made of; immutable, so that it can be made later."""

    node: Node
    status: NodeStatus
    claims: dict[str, tuple[Claim, ...]]
    fresh_until: float | None
    conditions: dict[str, Condition]

    def message(self, now: float) -> fleet_pb2.Node:
        """Return the node as a message."""
        return node_message(
            self.node, self.status, self.claims, self.fresh_until, now, self.conditions
        )


@dataclass(frozen=True, slots=True)
class AllocationRow:
    """What a message about an allocation is made of; immutable, so that it can be made later."""

    allocation: Allocation
    expires_at: float | None
    queue_position: int | None
    held_by: tuple[str, ...]

    def message(self) -> types_pb2.Allocation:
        """Return the allocation as a message."""
        return allocation_message(
            self.allocation, self.expires_at, self.queue_position, held_by=self.held_by
        )


def node_row(fleet: Fleet, node: Node) -> NodeRow:
    """Return what a message about `node` is made of."""
    name = node.facts.name
    claims = {gpu.uuid: fleet.claims.get(gpu.uuid, ()) for gpu in node.facts.gpus}
    known = (fleet.conditions.get(gpu.uuid) for gpu in node.facts.gpus)
    conditions = {each.uuid: each for each in known if each is not None}
    return NodeRow(node, fleet.status(name), claims, fleet.fresh_until.get(name), conditions)


def allocation_row(fleet: Fleet, allocation: Allocation) -> AllocationRow:
    """Return what a message about `allocation` is made of."""
    return _row(fleet, allocation, _position(fleet, allocation.id))


def allocation_rows(fleet: Fleet, *, include_ended: bool) -> Iterator[AllocationRow]:
    """Yield what messages about all allocations are made of; to be read before anything changes."""
    positions = {waiting.id: place for place, waiting in enumerate(fleet.queue(), 1)}
    for allocation in fleet.allocations.values():
        if include_ended or allocation.state is not AllocationState.ENDED:
            yield _row(fleet, allocation, positions.get(allocation.id))


def change_message(fleet: Fleet, change: Change, now: float) -> fleet_pb2.WatchResponse:
    """Return a change with its object; what a node reported is added as it is now."""
    message = fleet_pb2.WatchResponse(
        resource_version=change.version, at=change.event.at, event=type(change.event).__name__
    )
    match change.after:
        case Allocation():
            message.allocation.CopyFrom(allocation_row(fleet, change.after).message())
        case Node():
            message.node.CopyFrom(node_row(fleet, change.after).message(now))
        case None:
            pass
    return message


def _row(fleet: Fleet, allocation: Allocation, queue_position: int | None) -> AllocationRow:
    # A change that is read late may be older than the fleet: then it has no expiry and no place.
    is_granted = allocation.state is AllocationState.GRANTED
    is_waiting = allocation.state is AllocationState.WAITING
    held = {name: fleet.status(name).held for name in allocation.nodes}
    return AllocationRow(
        allocation,
        fleet.expires_at(allocation.id) if is_granted else None,
        queue_position if is_waiting else None,
        tuple(name for name, ids in held.items() if ids is not None and allocation.id in ids),
    )


def _position(fleet: Fleet, id_: str) -> int | None:
    mine = fleet.waiting.get(id_)
    if mine is None:
        return None
    return 1 + sum(other < mine for other in fleet.waiting.values())
