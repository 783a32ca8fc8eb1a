"""Who holds what on a node, and who speaks for a node that is called otherwise by now.

A host that was renamed is another node for the ledger, and the same agent: the journal under the
new name holds what was granted under the old one, so its report speaks for both.
"""

from collections.abc import Mapping
from typing import Protocol

from stoker.aggregator import commands
from stoker.aggregator.model import (
    Allocation,
    AllocationState,
    Claim,
    Command,
    Node,
    NodeStatus,
    Placement,
)


class Tables(Protocol):
    """What is looked at of the fleet."""

    @property
    def nodes(self) -> Mapping[str, Node]: ...
    @property
    def allocations(self) -> Mapping[str, Allocation]: ...
    @property
    def claims(self) -> Mapping[str, tuple[Claim, ...]]: ...
    @property
    def tenants(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def homes(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def sent(self) -> Mapping[str, Mapping[str, Command]]: ...
    def status(self, node: str) -> NodeStatus: ...


def allocations_on(fleet: Tables, node: str) -> dict[str, Allocation]:
    """Return by id what the node shall hold or let go of: granted and releasing.

    Also what it shall let go of that was granted under a former name of the node.
    """
    own = {id_: fleet.allocations[id_] for id_ in fleet.tenants.get(node, ())}
    former = granted_under_former_name(fleet, node)
    return own | {a.id: a for a in former if a.state is AllocationState.RELEASING}


def granted_under_former_name(fleet: Tables, node: str) -> list[Allocation]:
    """Return what is granted on GPUs of the node under another name that its agent had."""
    own = frozenset(fleet.tenants.get(node, ()))
    ids = dict.fromkeys(
        claim.allocation_id
        for gpu in fleet.nodes[node].facts.gpus
        for claim in fleet.claims.get(gpu.uuid, ())
        if claim.allocation_id not in own
    )
    others = [fleet.allocations[id_] for id_ in ids]
    return [each for each in others if former_name(fleet, each, node)]


def former_name(fleet: Tables, allocation: Allocation, node: str) -> str:
    """Return the node of the allocation for which `node` speaks by now; empty: there is none."""
    return next(
        (
            placement.node
            for placement in allocation.placements
            if placement.node != node and voice_of(fleet, placement) == node
        ),
        "",
    )


def voice_of(fleet: Tables, placement: Placement) -> str:
    """Return the node that speaks for a placement: its own, or what its agent is called by now.

    That is the same journal on the same GPUs: one on others is that of a host which was cloned.
    """
    node = placement.node
    if fleet.status(node).session != 0:
        return node
    incarnation = fleet.nodes[node].facts.incarnation
    for device in placement.devices:
        for name in fleet.homes.get(device.uuid, ()):
            is_same_agent = fleet.nodes[name].facts.incarnation == incarnation
            if is_same_agent and fleet.status(name).session != 0:
                return name
    return node


def still_with(fleet: Tables, allocation: Allocation) -> tuple[str, ...]:
    """Return the nodes that have not been heard to have let go of an allocation, or of a part."""
    placements = allocation.placements
    return tuple(each.node for each in placements if not has_let_go(fleet, allocation.id, each))


def has_let_go(fleet: Tables, allocation_id: str, placement: Placement) -> bool:
    """Whether its node certainly does not hold the allocation any more, of a gang its part.

    What a node said before it could not be heard any more still holds: it was told of nothing new
    since, and what it says when it is back takes the place of that.
    """
    voice = voice_of(fleet, placement)
    status = fleet.status(voice)
    if status.held is None:
        return False
    sent = fleet.sent.get(voice, {})
    return commands.has_let_go(allocation_id, status.held, sent, status.commands_done)
